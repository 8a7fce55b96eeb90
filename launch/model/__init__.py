"""The model that is trained: loaded or built from a configuration, and checked."""
