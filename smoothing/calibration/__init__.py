"""What tells whether probabilities can be believed, from sharded logits; and smoothing taken out of them."""
