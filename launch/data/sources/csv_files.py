"""CSV and TSV with line numbers. A damaged row loses that row; an unclosed quote loses the rest of the file."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from launch.common.errors import Reject
from launch.common.messages import shortened
from launch.common.strict_json import repeated
from launch.data.records import DataError, Record

UNCLOSED = "unexpected end of data"  # the csv module's message for an unclosed quote, and for nothing else


def csv_rows(path: Path) -> Iterator[Record | tuple[str, Reject]]:
    return _separated(path, ",")


def tsv_rows(path: Path) -> Iterator[Record | tuple[str, Reject]]:
    return _separated(path, "\t")


def _separated(path: Path, delimiter: str) -> Iterator[Record | tuple[str, Reject]]:
    # Bytes that are not UTF-8 become lone surrogates, so that only their own row is lost.
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    lines = list(io.StringIO(text, newline=""))
    limit = csv.field_size_limit(len(text) + 1)
    try:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header = None
        while True:
            first = rows.line_num
            where = f"{path}:{first + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                if str(error) == UNCLOSED:
                    detail = _unclosed(lines[first:], first, delimiter)
                else:
                    detail = f"{error}, line {rows.line_num}: {_lost(rows.line_num - first)} with it"
                yield where, Reject("broken CSV", detail)
                continue
            if not row:
                continue
            if header is None:
                header = _header(row, path)
                continue
            try:
                yield Record(_fields(header, row), where)
            except Reject as reject:
                yield where, reject
    finally:
        csv.field_size_limit(limit)


def _unclosed(lines: list[str], before: int, delimiter: str) -> str:
    """Tell where the quote opens that the last `lines` of a file never close, and how many lines that loses."""
    # csv without strict=True reads the unclosed field too: it is the last one and reaches to the end
    *_, field = next(csv.reader(lines, delimiter=delimiter))
    opened = before + len(lines) - max(1, len(list(io.StringIO(field, newline="")))) + 1
    return f"a quote opened at line {opened} is never closed: {_lost(len(lines))} with it"


def _lost(lines: int) -> str:
    return f"{lines} lines are lost" if lines > 1 else "1 line is lost"


def _header(row: list[str], path: Path) -> list[str]:
    header = [name.strip() for name in row]
    twice = "" if "" in header else repeated(header)
    if twice is not None:
        found = f"{shortened(repr(twice))} twice" if twice else "a column without a name"
        raise DataError(f"{path}:1 was expected to name each column once, but it holds {found}.")
    return header


def _fields(header: list[str], row: list[str]) -> dict[str, str]:
    if len(row) != len(header):
        raise Reject("wrong number of columns", f"{len(row)} instead of {len(header)}")
    for value in row:
        if "\0" in value:
            raise Reject("null bytes")
        if any("\udc80" <= character <= "\udcff" for character in value):
            raise Reject("not UTF-8")
    return dict(zip(header, row, strict=True))
