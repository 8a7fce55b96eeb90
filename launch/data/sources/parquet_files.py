"""Parquet files, with row numbers where other files have line numbers."""

from pathlib import Path

import pyarrow.parquet

from launch.common.errors import Reject
from launch.common.messages import error_line, shortened
from launch.common.strict_json import repeated
from launch.data.records import DataError, Record, Records, Rejected
from launch.data.sources.arrow_rows import BATCH, BROKEN, arrow_rows, index_note

BUFFER = 2**20  # bytes of a column


def parquet_rows(path: Path) -> Records:
    """Yield the rows of a Parquet file. A damaged row group loses what is left of that group.

    Raises DataError if the file is not Parquet, or names a column twice.
    """
    try:
        # without a buffer size, and with pre_buffer, whole row groups are read into memory
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER)
    except BROKEN as error:
        raise DataError(f"{path} was expected to be Parquet, but cannot be read: {error}") from error
    with file:
        twice = repeated(file.schema_arrow.names)
        if twice is not None:  # rows as mappings would hold the last of the two
            raise DataError(f"{path} has two columns named {shortened(repr(twice))}; rename or drop one.")
        yield from index_note(file.schema_arrow.names)
        first = 0  # row of the file with which the group starts
        for group in range(file.num_row_groups):
            number = first
            try:
                for batch in file.iter_batches(BATCH, row_groups=[group]):
                    for fields in arrow_rows(batch):
                        number += 1
                        yield Record(fields, f"{path}:{number}")
            except BROKEN as error:
                yield Rejected.of(f"{path}:{number + 1}", Reject(*_damaged(error, group, file.num_row_groups)))
            first += file.metadata.row_group(group).num_rows


def _damaged(error: Exception, group: int, groups: int) -> tuple[str, str]:
    lost = "the rest of the file" if groups == 1 else "the rest of this row group"
    return f"damaged Parquet, {lost} is lost", f"row group {group + 1} of {groups}: {error_line(error, 80)}"
