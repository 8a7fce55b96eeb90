"""Where rows come from: files, directories, hub names, the docstrings of the standard library."""
