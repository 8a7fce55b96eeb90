"""The sources of a run, and their records in batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from launch.data.records import DataError, Note, Record, Records, Rejected
from launch.data.sources.files import iter_records, name_of, source_fingerprint
from launch.data.sources.stdlib_docstrings import corpus_fingerprint, docstring_corpus

ROWS_A_BATCH = 64
CHARACTERS_A_BATCH = 1 << 22
Batch = list[Record | Rejected | Note]


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        name: As the user gave it, but for a revision.
        records: Reads it from its beginning.
        fingerprint: Returns a hash of what it holds.
    """

    name: str
    records: Callable[[], Records]
    fingerprint: Callable[[], str]


@dataclass(frozen=True)
class Sources:
    """The sources to train on and to evaluate on; without the latter, `fraction` of the former's rows is held out."""

    train: Sequence[Source]
    heldout: Sequence[Source]
    fraction: float

    def fingerprints(self) -> list:
        """Return names and hashes of all sources, and what is held out."""
        parts = (self.train, self.heldout)
        return [*([(source.name, source.fingerprint()) for source in part] for part in parts), self.fraction]


def sources_of(
    data: Sequence[str] | None,
    eval_data: str | None = None,
    eval_fraction: float = 0.05,
    streaming: bool = False,
) -> Sources:
    """Return the sources that the flags of these names stand for. Raises DataError for an invalid fraction."""
    if not 0 <= eval_fraction < 1:
        raise DataError(f"Expected eval_fraction in [0, 1), got {eval_fraction}.")
    heldout = [] if eval_data is None else [_source(eval_data, held_out=True)]
    if data is not None:
        train = [_source(name, streamed=streaming) for name in data]
        return Sources(train, heldout, 0.0 if heldout else eval_fraction)
    corpus = cache(docstring_corpus)

    def docstrings() -> Records:
        yield Note("no data given: docstrings of the Python standard library, whole modules held out")
        if corpus().unparsable:
            yield Note(f"{corpus().unparsable} files of the standard library could not be parsed")
        yield from corpus().train

    name = "docstrings of the standard library"
    heldout = heldout or [Source(name, lambda: iter(corpus().heldout), corpus_fingerprint)]
    return Sources([Source(name, docstrings, corpus_fingerprint)], heldout, 0.0)


def _source(name: str, held_out: bool = False, streamed: bool = False) -> Source:
    how = (name, held_out, streamed)
    return Source(name_of(name), lambda: iter_records(*how), lambda: source_fingerprint(*how))


def batches(records: Records) -> Iterator[Batch]:
    """Yield records in batches, whose bounds depend on the records alone.

    What reading raises comes after the records before it.
    """
    batch: Batch = []
    size, failure = 0, None
    while True:
        try:
            record = next(records)
        except StopIteration:
            break
        except Exception as error:
            failure = error
            break
        batch.append(record)
        size += _characters(record.fields) if isinstance(record, Record) else 0
        if len(batch) == ROWS_A_BATCH or size > CHARACTERS_A_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
    if failure is not None:
        raise failure


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    if isinstance(value, list):
        return sum(map(_characters, value)) if value and not isinstance(value[0], int) else 8 * len(value)
    return 8
