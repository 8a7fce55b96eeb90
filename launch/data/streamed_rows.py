"""The rows of a stream by their place: for Trainer rows of a file, of which a resume skips places, not rows."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy
from torch.utils.data import Dataset

from launch.data.blank_rows import BLANK
from launch.data.encode_batch import BatchEncoder, EncodedBatch, Kept, lost
from launch.data.examples.rows import IGNORED
from launch.data.records import Note, Record, Rejected
from launch.data.stream import Stream
from launch.data.stream_found import Found
from launch.data.workers import Workers
from launch.process.ranks import say

ROWS_A_BATCH = 32


@dataclass(frozen=True)
class Streaming:
    """What a run streams its rows from.

    Attributes:
        stream: Gives the records.
        encoder: Makes rows of records.
        workers: Processes of a rank to encode in; 0 for its own.
        strict: Stop at the first record that cannot be used.
        fingerprint: Of the sources.
        told: Notes on the sources that are in the log already.
    """

    stream: Stream
    encoder: BatchEncoder
    workers: int
    strict: bool
    fingerprint: str
    told: tuple[str, ...] = ()


class Share(NamedTuple):
    """Which places of a stream a data-parallel rank takes: every `ranks`-th micro-batch, of `size` rows."""

    rank: int
    ranks: int
    size: int

    def has(self, place: int) -> bool:
        return place // self.size % self.ranks == self.rank


class StreamedRows(Dataset):
    """The first `count` rows of a stream; a rank reads all records of it, and encodes those of its share.

    Rows come as fast as they do only in ascending order: another place is looked for from the stream's beginning. A
    record that cannot be encoded is a blank row, since the other ranks do not know of it.

    Args:
        streaming: What they are made from.
        share: The places that will be asked for.
        seed: Of the stream's order.
        count: How many rows all ranks take together.
        token_id: What blank rows hold.
        beat: Called now and then while sources are read.

    Attributes:
        found: What was found while rows were made.
    """

    def __init__(
        self,
        streaming: Streaming,
        share: Share,
        seed: int,
        count: int,
        token_id: int,
        beat: Callable[[], None] | None = None,
    ):
        self.streaming, self.share, self.seed, self.count = streaming, share, seed, count
        self.blank = {"input_ids": [token_id] * 2, "labels": [IGNORED] * 2, "where": BLANK}
        self.beat = beat
        self.found = Found(streaming.strict, first=share.rank == 0)
        self._rows: Iterator[tuple[int, Mapping[str, Any]]] | None = None
        self._next = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> Mapping[str, Any]:
        """Return a row of this rank's share. Raises RuntimeError for one of another's."""
        if not self.share.has(place):
            raise RuntimeError(f"row {place} is not of the {self.share} that this rank was to be asked for")
        if self._rows is None or place < self._next:
            self.close()
            if place >= ROWS_A_BATCH:
                say(f"data: reading past the first {place:,} rows")
            self._rows = self._encoded(place)
        for here, row in self._rows:
            if here == place:
                self._next = place + 1
                return row
        raise IndexError(place)

    def close(self) -> None:
        """End the processes that encode."""
        if self._rows is not None:
            self._rows.close()  # type: ignore[attr-defined]  # a generator
        self._rows = None

    def _encoded(self, start: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Yield this rank's rows from place `start` on, with their places."""
        places = (place for place in range(start, self.count) if self.share.has(place))
        with Workers(self.streaming.workers, self.streaming.encoder, lost) as pool:
            for batch in pool.map(self._batches(start)):
                for (outcome, row), place in zip(self._made(batch), places, strict=False):
                    self.found.reach(place)
                    self.found.add(outcome)
                    yield place, row

    def _batches(self, start: int) -> Iterator[list[Record | Rejected | Note]]:
        records = self._own(start)
        while batch := list(islice(records, ROWS_A_BATCH)):
            yield batch

    def _own(self, start: int) -> Iterator[Record | Rejected | Note]:
        first = start - start % (self.share.ranks * self.share.size)  # at which all ranks start
        for place, record in self.streaming.stream.records(first, self.seed, self.found, self.beat):
            if place >= self.count:
                return
            if place >= start and self.share.has(place):
                yield record

    def _made(self, batch: EncodedBatch) -> Iterator[tuple[Kept | Rejected | Note, Mapping[str, Any]]]:
        """Yield what became of each record of a batch, and its row."""
        made = 0
        for outcome in batch.outcomes:
            if isinstance(outcome, Kept):
                ids, labels = (batch.rows.column(name)[made].values for name in ("input_ids", "labels"))
                made += 1
                yield outcome, {"input_ids": numpy.array(ids), "labels": numpy.array(labels), "where": outcome.where}
            else:
                yield outcome, self.blank
