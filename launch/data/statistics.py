"""How long rows are, and how much of them is learned."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy


@dataclass(frozen=True)
class Statistics:
    """Of rows: the median length, the one that 95 % do not exceed, the longest, and all tokens and label tokens."""

    median: int
    most: int
    longest: int
    tokens: int
    learned: int

    @classmethod
    def of(cls, lengths: Sequence[int], learned: Sequence[int]) -> "Statistics":
        """Compute them from each row's length and its number of label tokens; there must be a row."""
        median, most = numpy.quantile(lengths, [0.5, 0.95], method="inverted_cdf")
        return cls(int(median), int(most), int(max(lengths)), int(sum(lengths)), int(sum(learned)))

    def describe(self) -> str:
        return (
            f"lengths: median {self.median:,}, 95 % {self.most:,}, longest {self.longest:,} tokens; "
            f"{100 * self.learned / self.tokens:.0f} % of tokens are learned"
        )
