"""A loss inside a Hugging Face model: its output head, its forward, what it supports."""
