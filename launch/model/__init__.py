"""The model of a run: loaded or built, and checked."""
