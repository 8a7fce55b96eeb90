"""The loss inside a Hugging Face model: what takes the place of its output head and loss, and what is refused."""
