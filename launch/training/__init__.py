"""The training loop: Trainer, metrics, milestones, samples, export."""
