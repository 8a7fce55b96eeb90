"""What a row means: its format, its conversation, its tokens, and which of them are labels."""
