"""A stream: the usable records of sources in a shuffled order, epoch after epoch, read again each time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from launch.common.errors import Reject
from launch.common.messages import one_line
from launch.data.read import Source
from launch.data.records import DataError, Note, Record, Rejected
from launch.data.stream_found import Epoch, Found

UNSHUFFLED = 256  # records read at a time where no order is drawn


@dataclass(frozen=True)
class Stream:
    """Gives every record that looks usable a place in an endless sequence, without tokenising anything.

    The place depends on the records, `buffer` and `seed` alone: every rank finds its share by itself, and a resumed
    run its records by reading them again. A record that turns out unusable once it is tokenised keeps its place.

    Args:
        sources: Read one after the other, from their beginnings in each epoch.
        check: Raises Reject for a record that can be known to be unusable; cheap, since each rank calls it for all.
        buffer: How many records are read and then put in a random order; 0: they stay in the order of the sources.
        left_out: The `where` of records that are held out.
    """

    sources: Sequence[Source]
    check: Callable[[Record], Any]
    buffer: int
    left_out: frozenset[str] = frozenset()

    def records(
        self, start: int, seed: int, found: Found, beat: Callable[[], None] | None = None
    ) -> Iterator[tuple[int, Record]]:
        """Yield places and their records from place `start` on.

        Args:
            start: The first place.
            seed: Of the order; each epoch has another one.
            found: Is told what there is beside the records, with the place before which it was read.
            beat: Called now and then while sources are read, which takes long where `start` is far.

        Raises:
            DataError: If an epoch has no record, or a source cannot be read.
        """
        epoch, begin = 0, 0  # the epoch's first place
        while True:
            end = begin
            for number, (block, others) in enumerate(self._blocks()):
                if beat is not None:
                    beat()
                if end >= start:  # else they were told before
                    found.note(end, others)
                if end + len(block) > start:
                    for place, index in enumerate(self._order(len(block), [seed, epoch, number]), end):
                        if place >= start:
                            yield place, block[index]
                end += len(block)
            if end == begin:
                names = ", ".join(source.name for source in self.sources)
                raise DataError(f"{names}: no record to train on is left.")
            if end >= start:
                found.note(end, [Epoch(epoch + 1, end - begin)])
            passed = max(0, (start - end) // (end - begin))  # epochs that need not be read to be counted
            epoch, begin = epoch + 1 + passed, end + passed * (end - begin)

    def _order(self, count: int, seed: list[int]) -> Sequence[int]:
        return numpy.random.default_rng(seed).permutation(count).tolist() if self.buffer else range(count)

    def _blocks(self) -> Iterator[tuple[list[Record], list[Rejected | Note]]]:
        """Yield the records of an epoch, `buffer` at a time, with what else was read."""
        block: list[Record] = []
        others: list[Rejected | Note] = []
        for record in self._checked():
            if isinstance(record, Record):
                block.append(record)
            else:
                others.append(record)
            if len(block) == (self.buffer or UNSHUFFLED):
                yield block, others
                block, others = [], []
        yield block, others

    def _checked(self) -> Iterator[Record | Rejected | Note]:
        """Yield an epoch of all sources but the held-out records, and a Rejected for those that fail the check."""
        for source in self.sources:
            for record in source.records():
                if isinstance(record, Record):
                    if one_line(record.where) in self.left_out:
                        continue
                    try:
                        self.check(record)
                    except Reject as reject:
                        yield Rejected.of(record.where, reject)
                        continue
                yield record
