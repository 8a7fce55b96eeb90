"""Records with their origin, and the report of dropped rows: what all parts of the data layer share."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from launch.common.errors import Reject, UserError
from launch.common.messages import counted, one_line


class DataError(UserError):
    """An error in the user's data: what was expected, what came, and what to do."""


@dataclass(frozen=True)
class Record:
    """One row as it was read; `where` is its `file:line`."""

    fields: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Rejected:
    """One dropped row or file."""

    where: str
    reason: str
    detail: str = ""
    whole_file: bool = False

    @classmethod
    def of(cls, where: str, reject: Reject) -> "Rejected":
        """Return what is reported of the row or file at `where`, which cannot be used."""
        return cls(where, reject.reason, reject.detail, reject.whole_file)

    def __str__(self) -> str:
        return one_line(f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else ""))

    def place(self) -> str:
        """Return its `where` and detail, for a line that names the reason."""
        return one_line(f"{self.where} ({self.detail})" if self.detail else self.where)


@dataclass(frozen=True)
class Note:
    """A line for the log about how a source is read: which of its files or columns are left out, and why."""

    text: str


Records = Iterator[Record | Rejected | Note]  # what a source yields


@dataclass
class DropReport:
    """Dropped rows with their reasons, and kept rows and files that the user may want to look at.

    `truncated`: rows kept with a shortened prompt. `spelled_out`: rows kept, and the special token that each holds.
    `noted`: what is worth knowing about rows that are kept, and which rows.
    `left_out`: notes on how a source was read, such as files that were left out by their names.
    """

    rejections: list[Rejected] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)
    spelled_out: dict[str, str] = field(default_factory=dict)
    noted: dict[str, list[str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def add(self, where: str, reject: Reject, strict: bool = False) -> None:
        """Count one dropped row. Raises DataError instead when `strict`."""
        self.reject(Rejected.of(where, reject), strict)

    def reject(self, rejected: Rejected, strict: bool = False) -> None:
        """Count one dropped row. Raises DataError instead when `strict`."""
        self.rejections.append(rejected)
        if strict:
            raise DataError(f"{rejected}. Fix or remove it, or run without --strict to drop it.")

    def counts(self) -> Counter[str]:
        """Count the dropped rows by reason."""
        return Counter(rejected.reason for rejected in self.rejections)

    def summary(self, examples: int = 3) -> str:
        """Return a few lines of text: each reason with its count and its first rows."""
        files = len(self) - self.dropped()
        lines = [
            f"{counted(self.dropped(), 'row')} dropped" + (f", {counted(files, 'file')} not read" if files else "")
        ]
        for reason, count in self.counts().most_common():
            rows = [r for r in self.rejections if r.reason == reason]
            lines.append(f"  {count} x {reason}: {_some([row.place() for row in rows], examples)}")
        if self.truncated:
            shown = _some(self.truncated, examples)
            lines.append(f"{counted(len(self.truncated), 'prompt')} shortened from the left (rows kept): {shown}")
        if self.spelled_out:
            shown = _some([f"{where} ({token})" for where, token in self.spelled_out.items()], examples)
            texts = counted(len(self.spelled_out), "text")
            lines.append(f"{texts} with special tokens, read as those tokens (rows kept): {shown}")
        for note, places in self.noted.items():
            lines.append(f"{len(places)} x {note} (rows kept): {_some(places, examples)}")
        return "\n".join(lines + self.left_out)

    def lines(self) -> str:
        """Return every entry on a line of its own: `file:line: reason`."""
        texts = [*map(str, self.rejections), *(f"{one_line(w)}: prompt shortened" for w in self.truncated)]
        texts += [one_line(f"{where}: holds {token}") for where, token in self.spelled_out.items()]
        return "".join(f"{text}\n" for text in texts)

    def dropped(self) -> int:
        """Count the dropped rows, without files."""
        return sum(not rejected.whole_file for rejected in self.rejections)

    def __len__(self) -> int:
        return len(self.rejections)


def _some(places: list[str], count: int) -> str:
    return ", ".join(map(one_line, places[:count])) + (", ..." if len(places) > count else "")
