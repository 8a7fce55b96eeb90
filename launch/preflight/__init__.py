"""--sanity: checks on one device before a long run."""
