"""Prepared rows: a folder of an Arrow file, which every rank maps, and a summary of what it was made from."""

import hashlib
import json
from bisect import bisect_left
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets

from launch.data.records import DropReport, Rejected
from launch.data.rows_file import map_rows
from launch.data.sources.fingerprint import fingerprint_of_files
from launch.data.statistics import Statistics
from launch.data.streamed_rows import Streaming

ROWS = "rows.arrow"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Summary:
    """What was found in the sources.

    Attributes:
        prepared: When.
        checksum: Of the file of rows.
        sources: The sources to train on, with the number of rows of each.
        heldout: The held-out rows' places in the file.
        digest: The SHA-256 of the training rows: tokens, labels and row boundaries, in order.
        formats: The rows in each format.
        statistics: Of the training rows.
        stops: The tokens that end answers.
        report: What was dropped.
    """

    prepared: str
    checksum: str
    sources: list[tuple[str, int]]
    heldout: list[int]
    digest: str
    formats: dict[str, int]
    statistics: Statistics
    stops: list[int]
    report: DropReport

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Summary":
        """Read what `to_json` has written. Raises ValueError, KeyError or TypeError for anything else."""
        values = json.loads(text)
        report = values["report"]
        report["rejections"] = [Rejected(**rejected) for rejected in report["rejections"]]
        values["sources"] = [(name, rows) for name, rows in values["sources"]]
        parts = {"statistics": Statistics(**values["statistics"]), "report": DropReport(**report)}
        return cls(**(values | parts))


@dataclass(frozen=True)
class EncodedData:
    """Both splits with the columns input_ids, labels, length and where, mapped from one file."""

    train: datasets.Dataset
    heldout: datasets.Dataset
    summary: Summary
    weights: list[float] | None = None  # of the sources (--data_weights)
    streaming: Streaming | None = None  # trained on instead of `train`, which has its first rows (--streaming)

    @property
    def report(self) -> DropReport:
        return self.summary.report

    @property
    def digest(self) -> str:
        """The SHA-256 of what is trained on: the rows in order, and the weights of their sources.

        Of a stream its first rows, and its files' names, sizes, beginnings and ends.
        """
        if self.streaming is not None:
            return hashlib.sha256(f"{self.summary.digest} {self.streaming.fingerprint}".encode()).hexdigest()
        if self.weights is None:
            return self.summary.digest
        return hashlib.sha256(f"{self.summary.digest} {self.weights}".encode()).hexdigest()

    @property
    def sources(self) -> list[range]:
        """The training rows of each source."""
        heldout = sorted(self.summary.heldout)
        ranges, first = [], 0
        for _, count in self.summary.sources:
            last = first + count
            ranges.append(range(*(end - bisect_left(heldout, end) for end in (first, last))))
            first = last
        return ranges


def checksum(folder: Path) -> str:
    return fingerprint_of_files([(ROWS, folder / ROWS)])


def damage(folder: Path) -> str | None:
    """Return what is wrong with a folder of prepared rows, None if nothing is."""
    try:
        summary = Summary.from_json((folder / SUMMARY).read_text())
        if checksum(folder) != summary.checksum:
            return f"{ROWS} is not as it was written"
    except Exception as error:  # JSON of another shape raises many types
        return f"{type(error).__name__}: {error}"
    return None


def open_prepared(folder: Path, weights: list[float] | None = None) -> EncodedData:
    """Map the rows of a folder; `weights` are those of its sources."""
    summary, rows = Summary.from_json((folder / SUMMARY).read_text()), map_rows(folder / ROWS)
    heldout = set(summary.heldout)
    train = [index for index in range(len(rows)) if index not in heldout]
    return EncodedData(rows.select(train), rows.select(summary.heldout), summary, weights)
