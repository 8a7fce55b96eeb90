"""Parquet files, with row numbers where other files have line numbers."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from launch.common.messages import shortened
from launch.common.strict_json import repeated
from launch.data.records import DataError, Record


def parquet_rows(path: Path) -> Iterator[Record]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            twice = repeated(file.schema_arrow.names)
            if twice is not None:  # rows as dicts would hold the last of the two
                raise DataError(f"{path} has two columns named {shortened(repr(twice))}; rename or drop one.")
            number = 0
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(fields, f"{path}:{number}")
    except (pyarrow.ArrowException, ArithmeticError, UnicodeDecodeError, ValueError, OSError) as error:
        raise DataError(f"{path} was expected to be Parquet, but cannot be read: {error}") from error
