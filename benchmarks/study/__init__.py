"""Does smoothing help? Fine-tunes one base with and without it, and measures what it did: `make study`."""
