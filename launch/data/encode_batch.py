"""What is made of a batch of records: rows in Arrow, and for each record what became of it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy
import pyarrow

from launch.common.errors import Reject
from launch.common.messages import one_line, shortened
from launch.data.encode import Encoder
from launch.data.examples.columns import Columns
from launch.data.examples.formats import detect_format, to_example, used_columns
from launch.data.examples.kinds import Example, TokenExample
from launch.data.examples.rows import IGNORED, Row
from launch.data.examples.special_tokens import SpelledOut
from launch.data.examples.tokens import Untokenised
from launch.data.records import DropReport, Note, Record, Rejected
from launch.data.rows_file import RowColumns

DIGEST_BYTES = 16
UNRECOGNISED = "unrecognised fields"


class Kept(NamedTuple):
    """A record that became a row, and what to report of it."""

    where: str
    format: str
    learned: int
    cut: int
    special_token: str
    notes: tuple[str, ...] = ()
    stop: int | None = None  # the token that ends its last answer; None for rows that came as tokens

    def tell(self, report: DropReport) -> None:
        """Add to a report what a user may want to know of this row."""
        if self.cut:
            report.truncated.append(self.where)
        if self.special_token:
            report.spelled_out[self.where] = self.special_token
        for note in self.notes:
            report.noted.setdefault(note, []).append(self.where)


class EncodedBatch(NamedTuple):
    """Rows, a digest of each, and the outcome of each record or note of the batch, all in order."""

    outcomes: list[Kept | Rejected | Note]
    rows: pyarrow.RecordBatch
    digests: bytes
    found: frozenset[str] = frozenset()  # the columns of its records
    used: frozenset[str] = frozenset()  # those that play a part

    def first_rows(self, count: int) -> "EncodedBatch":
        """Return the batch up to its row number `count`."""
        if self.rows.num_rows <= count:
            return self
        kept = [number for number, outcome in enumerate(self.outcomes) if isinstance(outcome, Kept)]
        end = kept[count]
        digests = self.digests[: count * DIGEST_BYTES]
        return EncodedBatch(self.outcomes[:end], self.rows.slice(0, count), digests, self.found, self.used)


class _Begun(NamedTuple):
    """A record on its way to a row."""

    where: str
    format: str
    example: Example
    row: Row | Untokenised


class BatchEncoder:
    """Encodes batches of records.

    Args:
        tokenizer: Whose special tokens are looked for in texts.
        encode: Makes a row of an example.
        columns: Columns that are read under other names.
    """

    def __init__(self, tokenizer, encode: Encoder, columns: Columns | None = None):
        self._special, self.encode = SpelledOut(tokenizer), encode
        self.columns = columns or Columns()

    def __call__(self, batch: Sequence[Record | Rejected | Note]) -> EncodedBatch:
        """Encode a batch. Raises DataError for what no row could be encoded with, such as a missing template."""
        outcomes: list[Kept | Rejected | Note] = []
        columns = RowColumns()
        digests = []
        found: set[str] = set()
        used: set[str] = set()
        begun = [self._begin(record, found, used) if isinstance(record, Record) else record for record in batch]
        texts = [one.row for one in begun if isinstance(one, _Begun) and isinstance(one.row, Untokenised)]
        tokens = iter(self.encode.together(texts))
        for one in begun:
            if not isinstance(one, _Begun):
                outcomes.append(one)
                continue
            try:
                with _every_failure_rejects():
                    row = self.encode.finish(one.row, next(tokens)) if isinstance(one.row, Untokenised) else one.row
            except Reject as reject:
                outcomes.append(Rejected.of(one.where, reject))
                continue
            outcomes.append(self._kept(one, row))
            columns.add(row["input_ids"], row["labels"], one_line(one.where))
            digests.append(row_digest(row["input_ids"], row["labels"]))
        return EncodedBatch(outcomes, columns.batch(), b"".join(digests), frozenset(found), frozenset(used))

    def _begin(self, record: Record, found: set[str], used: set[str]) -> "_Begun | Rejected":
        """Begin to encode a record; add its columns to `found`, and those that its format uses to `used`."""
        found.update(record.fields)
        try:
            format, fields = self._recognised(record)
            used |= used_columns(format, self.columns)
            example = to_example(Record(fields, record.where), format)
            with _every_failure_rejects():
                return _Begun(record.where, format, example, self.encode.begin(example))
        except Reject as reject:
            return Rejected.of(record.where, reject)

    def _kept(self, begun: "_Begun", row: Row) -> Kept:
        learned = int((row["labels"][1:] != IGNORED).sum())
        token = self._special.first(begun.example) or ""
        stop = None if isinstance(begun.example, TokenExample) else int(row["input_ids"][-1])
        notes = tuple(row["notes"])
        return Kept(begun.where, begun.format, learned, row["prompt_tokens_cut"], token, notes, stop)

    def example_of(self, record: Record) -> Example:
        """Return the example that a record stands for. Raises Reject for one that cannot be used."""
        format, fields = self._recognised(record)
        return to_example(Record(fields, record.where), format)

    def _recognised(self, record: Record) -> tuple[str, Mapping[str, Any]]:
        """Return a record's format, and its fields under their new names."""
        fields = self.columns.rename(record.fields)
        format = detect_format(fields)
        if format is None:
            raise Reject(UNRECOGNISED, shortened(", ".join(map(str, fields))) or "none")
        return format, fields


@contextmanager
def _every_failure_rejects() -> Iterator[None]:
    """Raise Reject where a row takes all memory, or ends in a panic of a library in Rust."""
    try:
        yield
    except MemoryError:
        raise Reject("needs more memory than a row may use") from None
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise Reject("cannot be encoded", shortened(f"{type(error).__name__}: {error}")) from None


def row_digest(ids: numpy.ndarray, labels: numpy.ndarray) -> bytes:
    """Return a hash of a row's tokens and labels."""
    digest = hashlib.blake2b(ids.data, digest_size=DIGEST_BYTES)
    digest.update(labels.data)
    return digest.digest()


def lost(record: Record | Rejected | Note, reason: str) -> EncodedBatch:
    """Return what is made of a record that ends the process that encodes it: a rejection."""
    if isinstance(record, Record):
        record = Rejected(record.where, "ends the process that encodes it", reason)
    return EncodedBatch([record], RowColumns().batch(), b"")
