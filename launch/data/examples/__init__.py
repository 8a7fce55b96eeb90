"""What a row means: its format, its conversation, its tokens and labels."""
