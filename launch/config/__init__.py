"""What can be set: flags, recipes, training arguments, DeepSpeed files. Unknown keys and wrong values are errors."""
