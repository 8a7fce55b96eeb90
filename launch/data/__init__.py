"""Which rows are trained on, and which of their tokens are learned; every dropped row is counted with its reason."""
