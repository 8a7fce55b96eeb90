"""Which rows are shown: some drawn from all, the longest, a few that were shortened, and a few that were dropped."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from launch.common.messages import one_line
from launch.data.prepared import EncodedData
from launch.data.records import Rejected

MOST_SHORTENED = 3
MOST_DROPPED = 6


@dataclass(frozen=True)
class Chosen:
    """Rows to show.

    Attributes:
        drawn: Indices of training rows, ascending.
        longest: The index of the longest training row.
        shortened: Indices of training rows whose beginning was cut.
        dropped: Rows that are not trained on.
    """

    drawn: list[int]
    longest: int
    shortened: list[int]
    dropped: list[Rejected]


def choose(data: EncodedData, count: int, seed: int) -> Chosen:
    """Choose rows; the same for the same data and `seed`."""
    rows = len(data.train)
    drawn = sorted(random.Random(f"preview {seed}").sample(range(rows), min(count, rows)))
    lengths = list(data.train["length"])
    longest = lengths.index(max(lengths))
    truncated = {one_line(where) for where in data.report.truncated}
    shortened = []
    if truncated:
        shortened = [index for index, where in enumerate(data.train["where"]) if where in truncated]
    return Chosen(drawn, longest, shortened[:MOST_SHORTENED], _dropped(data.report.rejections))


def _dropped(rejections: Sequence[Rejected]) -> list[Rejected]:
    """Return rejections of as many reasons as there is room for, and then more of the same ones."""
    firsts = list({rejected.reason: rejected for rejected in reversed(rejections)}.values())[::-1]
    others = [rejected for rejected in rejections if rejected not in firsts]
    return (firsts + others)[:MOST_DROPPED]
