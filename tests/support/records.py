"""The records of a source as a list, for tests; the job itself never holds them all."""

from launch.common.errors import Reject
from launch.data.records import DropReport, Note, Record
from launch.data.sources.files import iter_records


def read_records(source: str, report: DropReport, strict: bool = False, held_out: bool = False) -> list[Record]:
    """Return the records of `iter_records` as a list; the rest goes into `report`.

    Raises DataError as `iter_records` does, and when `strict` for the first bad row or file.
    """
    records = []
    for row in iter_records(source, held_out):
        if isinstance(row, Record):
            records.append(row)
        elif isinstance(row, Note):
            report.left_out.append(row.text)
        else:
            report.add(row.where, Reject(row.reason, row.detail, row.whole_file), strict)
    return records
