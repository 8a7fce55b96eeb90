"""A run in one page: what was learned, how it went, and whether its probabilities can be believed."""
