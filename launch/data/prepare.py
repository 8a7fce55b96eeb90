"""Preparation: the records of all sources are encoded, in several processes, and written to one Arrow file."""

import hashlib
import random
from array import array
from collections import Counter
from datetime import datetime
from pathlib import Path

from launch.common.atomic_files import write_whole
from launch.common.messages import counted, shortened
from launch.data.encode_batch import DIGEST_BYTES, UNRECOGNISED, BatchEncoder, EncodedBatch, Kept, lost
from launch.data.examples.columns import Columns
from launch.data.examples.formats import known_formats
from launch.data.prepared import ROWS, SUMMARY, Summary, checksum
from launch.data.progress import RowsProgress
from launch.data.read import Source, Sources, batches
from launch.data.records import DataError, DropReport, Note, Record, Rejected
from launch.data.rows_file import RowsWriter
from launch.data.statistics import Statistics
from launch.data.workers import Workers

SMALLEST_SPLIT = 20


def prepare(
    sources: Sources,
    encoder: BatchEncoder,
    folder: Path,
    workers: int = 0,
    strict: bool = False,
    max_rows: int | None = None,
    why: str = "--max_rows",
    seed: int = 0,
) -> None:
    """Write the rows of all sources, and a summary of them, into `folder`.

    The file holds the rows to train on and those drawn from them to be held out, in the order of the sources, and
    then the rows of sources that are all held out. It does not depend on the number of processes.

    Args:
        sources: What to read.
        encoder: Makes rows of records.
        folder: An empty folder.
        workers: Processes to encode in; 0 for this one.
        strict: Stop at the first row that cannot be used.
        max_rows: Rows to take of each source that is not all held out; the rest of it is not read.
        why: Said of a source whose other rows are not read.
        seed: Draws the held-out rows.

    Raises:
        DataError: If no row of a split is usable, or when `strict` for the first unusable row.
    """
    rows = _Rows(strict)
    with (
        RowsWriter(folder / ROWS) as file,
        Workers(workers, encoder, lost) as pool,
        RowsProgress("preparing rows") as progress,
    ):
        counts = [rows.read(source, file, pool, progress, max_rows, why) for source in sources.train]
        count = len(rows.lengths)
        rows.require(count, encoder.columns)
        for source in sources.heldout:
            rows.read(source, file, pool, progress)
    rows.check_columns(encoder.columns)
    if sources.heldout:
        if len(rows.lengths) == count:
            names = ", ".join(repr(source.name) for source in sources.heldout)
            raise DataError(f"No usable held-out rows in {names}:\n{rows.report.summary()}")
        heldout = list(range(count, len(rows.lengths)))
    else:
        heldout = draw_heldout(count, sources.fraction, seed)
        if sources.fraction and not heldout:
            rows.report.left_out.append(
                f"nothing held out: {counted(count, 'row')}, and fewer than {SMALLEST_SPLIT} are not divided"
            )
    trained = [source.name for source in sources.train]
    summary = rows.summary(checksum(folder), list(zip(trained, counts, strict=True)), heldout)
    write_whole(folder / SUMMARY, summary.to_json())


def draw_heldout(count: int, fraction: float, seed: int) -> list[int]:
    """Return which of `count` rows are held out, in order; `seed` draws them."""
    if count < SMALLEST_SPLIT or not fraction:
        return []
    drawn = min(max(1, round(count * fraction)), count - 1)
    return sorted(random.Random(seed).sample(range(count), drawn))


Pool = Workers[Record | Rejected | Note, EncodedBatch]


class _Rows:
    """What is kept in memory of the rows while they are written: a few bytes each."""

    def __init__(self, strict: bool):
        self.strict = strict
        self.report = DropReport()
        self.formats: Counter[str] = Counter()
        self.found: set[str] = set()
        self.used: set[str] = set()
        self.stops: set[int] = set()
        self.lengths, self.learned, self.digests = array("i"), array("i"), bytearray()

    def read(
        self,
        source: Source,
        file: RowsWriter,
        pool: Pool,
        progress: RowsProgress,
        most: int | None = None,
        why: str = "",
    ) -> int:
        """Write the first `most` rows of a source, or all, and note `why` not all; return their number."""
        before = len(self.lengths)
        for batch in pool.map(batches(source.records())):
            if most is not None:
                batch = batch.first_rows(before + most - len(self.lengths))
            self._add(batch)
            file.add(batch.rows)
            progress.show(len(self.lengths), len(self.report))
            if most is not None and len(self.lengths) == before + most:
                self.report.left_out.append(f"{source.name}: its first {most:,} usable rows alone ({why})")
                break
        return len(self.lengths) - before

    def _add(self, batch: EncodedBatch) -> None:
        for outcome in batch.outcomes:
            if isinstance(outcome, Rejected):
                self.report.reject(outcome, self.strict)
            elif isinstance(outcome, Note):
                self.report.left_out.append(outcome.text)
            else:
                self._keep(outcome)
        self.lengths.frombytes(batch.rows.column("length").to_numpy().tobytes())
        self.digests += batch.digests
        self.found |= batch.found
        self.used |= batch.used

    def _keep(self, kept: Kept) -> None:
        self.formats[kept.format] += 1
        self.learned.append(kept.learned)
        kept.tell(self.report)
        if kept.stop is not None:
            self.stops.add(kept.stop)

    def check_columns(self, columns: Columns) -> None:
        """Note the columns that play no part. Raises DataError for one that is to be renamed and is not there."""
        if problem := columns.problem(self.found):
            raise DataError(problem)
        if unused := sorted(self.found - self.used):
            self.report.left_out.append(f"columns that play no part: {shortened(', '.join(unused), 300)}")

    def require(self, count: int, columns: Columns) -> None:
        """Raise DataError if there is no row to train on."""
        if count:
            return
        if problem := columns.problem(self.found):
            raise DataError(problem)
        reasons = self.report.counts()
        if set(reasons) == {UNRECOGNISED}:
            first = self.report.rejections[0]
            raise DataError(
                f"No format is recognised. {first.where} has the fields {first.detail}; expected one of: "
                f"{known_formats()}. Rename the fields (--columns prompt=...,completion=...)."
            )
        raise DataError(f"No training rows are left; fix the rows named here.\n{self.report.summary()}")

    def summary(self, checksum: str, sources: list[tuple[str, int]], heldout: list[int]) -> Summary:
        out = set(heldout)
        train = [index for index in range(len(self.lengths)) if index not in out]
        digest = hashlib.sha256()
        for index in train:
            digest.update(self.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])
        statistics = Statistics.of([self.lengths[i] for i in train], [self.learned[i] for i in train])
        return Summary(
            prepared=f"{datetime.now():%Y-%m-%d %H:%M}",
            checksum=checksum,
            sources=sources,
            heldout=heldout,
            digest=digest.hexdigest(),
            formats=dict(self.formats.most_common()),
            statistics=statistics,
            stops=sorted(self.stops),
            report=self.report,
        )
