"""What can be set: flags, recipes, training arguments, DeepSpeed files."""
