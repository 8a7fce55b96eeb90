"""From a record to a training row: its format, its chat template, its tokens, and which of them are labels."""
