"""The run directory: checkpoints, manifests, resume."""
