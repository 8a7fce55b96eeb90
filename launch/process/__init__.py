"""The processes of a run: how ranks start, talk, are watched, stop, and with which exit code."""
