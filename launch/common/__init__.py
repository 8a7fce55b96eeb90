"""Errors, text and files: what every other room uses."""
