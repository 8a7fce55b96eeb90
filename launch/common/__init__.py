"""What every other folder uses, and what uses none of them: errors, text, files, names of paths."""
