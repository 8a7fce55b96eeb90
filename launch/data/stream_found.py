"""What a rank comes upon while it takes rows of a stream, for the log."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from launch.data.encode_batch import Kept
from launch.data.records import DropReport, Note, Rejected


@dataclass
class Epoch:
    """An epoch that has ended: its number from 1 on, its records, and of how many this rank made rows or none."""

    number: int
    records: int
    rows: int = 0
    dropped: int = 0


@dataclass
class Taken:
    """What was found since it was last asked for; `rows` that were made, and epochs that have ended."""

    report: DropReport = field(default_factory=DropReport)
    rows: int = 0
    epochs: list[Epoch] = field(default_factory=list)


class Found:
    """Collects what is found, in the order of the rows although sources are read ahead of them.

    Args:
        strict: Raise DataError at the first row that cannot be used.
        first: This rank tells what all ranks find: what cannot be used without tokenising it.
    """

    def __init__(self, strict: bool = False, first: bool = True):
        self.strict, self.first = strict, first
        self._ahead: deque[tuple[int, Rejected | Note | Epoch]] = deque()
        self._taken = Taken()
        self._rows = self._dropped = 0  # of the epoch

    def note(self, place: int, read: Iterable[Rejected | Note | Epoch]) -> None:
        """Take what was read before the record at a place, to be told once that is reached."""
        self._ahead.extend((place, one) for one in read)

    def reach(self, place: int) -> None:
        """Tell what was read before a place. Raises DataError for a dropped row when strict."""
        while self._ahead and self._ahead[0][0] <= place:
            _, one = self._ahead.popleft()
            if isinstance(one, Epoch):
                one.rows, one.dropped = self._rows, self._dropped
                self._taken.epochs.append(one)
                self._rows = self._dropped = 0
            elif isinstance(one, Note):
                self._taken.report.left_out.append(one.text)
            elif self.first or self.strict:
                self.add(one)

    def add(self, outcome: Kept | Rejected | Note) -> None:
        """Tell what a record of this rank became. Raises DataError for a dropped row when strict."""
        if isinstance(outcome, Kept):
            outcome.tell(self._taken.report)
            self._taken.rows += 1
            self._rows += 1
        elif isinstance(outcome, Rejected):
            self._dropped += not outcome.whole_file
            self._taken.report.reject(outcome, self.strict)

    def take(self) -> Taken:
        """Return what was told since the last call."""
        taken, self._taken = self._taken, Taken()
        return taken
