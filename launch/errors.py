"""Mistakes that a user can mend."""


class UserError(Exception):
    """One sentence for the user: what was expected, what came, what to do. Shown without a traceback."""
