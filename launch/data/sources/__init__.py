"""Where rows come from: files, directories, hub names, the standard library's docstrings."""
