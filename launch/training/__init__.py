"""The training loop: Trainer with this loss, its metrics, what is due after a step, samples and export."""
