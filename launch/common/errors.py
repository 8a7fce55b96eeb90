"""Errors that end a run, or cost one row of its data, with a one-line error instead of a traceback."""


class UserError(Exception):
    """An error that the user can correct: what was expected, what came, what to do. Ranks mostly raise it alike."""


class LocalError(Exception):
    """An error that one rank alone may know of. That rank reports it, and exits without waiting for the others."""


class Reject(Exception):
    """One row, or one `whole_file`, cannot be used; `reason` is counted, `detail` is this one's particulars."""

    def __init__(self, reason: str, detail: str = "", whole_file: bool = False):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail, self.whole_file = reason, detail, whole_file

    def __reduce__(self):
        return Reject, (self.reason, self.detail, self.whole_file)
