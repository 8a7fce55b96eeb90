"""Encoded rows in an Arrow file: written as they come, memory-mapped by every rank."""

from pathlib import Path

import datasets
import numpy
import pyarrow

COLUMNS = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int32"),
        "where": datasets.Value("string"),
    }
)
ROWS_A_BATCH = 1000


class RowsWriter:
    """Writes rows to a file whose bytes depend on the rows alone, not on how many come at a time."""

    def __init__(self, path: Path):
        self._file = pyarrow.OSFile(str(path), "wb")
        self._stream = pyarrow.ipc.new_stream(self._file, COLUMNS.arrow_schema)
        self._waiting: list[pyarrow.RecordBatch] = []
        self._count = 0

    def __enter__(self) -> "RowsWriter":
        return self

    def __exit__(self, *_) -> None:
        try:
            self._write(self._count)
            self._stream.close()
        finally:
            self._file.close()

    def add(self, rows: pyarrow.RecordBatch) -> None:
        self._waiting.append(rows)
        self._count += rows.num_rows
        while self._count >= ROWS_A_BATCH:
            self._write(ROWS_A_BATCH)

    def _write(self, count: int) -> None:
        if count == 0:
            return
        rows = pyarrow.Table.from_batches(self._waiting)
        (batch,) = rows.slice(0, count).combine_chunks().to_batches()
        self._stream.write_batch(batch)
        self._waiting = rows.slice(count).to_batches()
        self._count -= count


class RowColumns:
    """Rows of a batch on their way to Arrow."""

    def __init__(self) -> None:
        self._ids: list[numpy.ndarray] = []
        self._labels: list[numpy.ndarray] = []
        self._where: list[str] = []

    def add(self, ids: numpy.ndarray, labels: numpy.ndarray, where: str) -> None:
        """Add a row; `ids` and `labels` are int32 [length]."""
        self._ids.append(ids)
        self._labels.append(labels)
        self._where.append(where)

    def batch(self) -> pyarrow.RecordBatch:
        lengths = numpy.array([len(ids) for ids in self._ids], dtype=numpy.int32)
        ends = numpy.cumsum(lengths, dtype=numpy.int32)
        offsets = pyarrow.array(numpy.concatenate([numpy.zeros(1, numpy.int32), ends]))
        lists = [
            pyarrow.ListArray.from_arrays(offsets, numpy.concatenate([numpy.zeros(0, numpy.int32), *rows]))
            for rows in (self._ids, self._labels)
        ]
        where = pyarrow.array(self._where, pyarrow.string())
        return pyarrow.RecordBatch.from_arrays([*lists, pyarrow.array(lengths), where], schema=COLUMNS.arrow_schema)


def map_rows(path: Path) -> datasets.Dataset:
    """Map a file of rows into memory. Raises `pyarrow.ArrowException` or `OSError` for one that is damaged."""
    return datasets.Dataset.from_file(str(path))
