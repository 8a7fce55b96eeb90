"""Whether a model's probabilities can be believed: measured on rows, written as JSON, and drawn."""
