"""What ends a run with a sentence instead of a traceback."""


class UserError(Exception):
    """A mistake that the user can mend: what was expected, what came, what to do. Ranks mostly raise it alike."""


class LocalError(Exception):
    """A mishap that one rank alone may know of. That rank says it, and leaves without waiting for the others."""
