"""CSV and TSV with line numbers. A damaged row loses that row; an unclosed quote loses the rest of the file."""

import csv
import io
from collections.abc import Iterator
from itertools import compress
from pathlib import Path
from typing import IO, cast

from launch.common.errors import Reject
from launch.common.messages import shortened
from launch.common.strict_json import repeated
from launch.data.records import DataError, Record, Records, Rejected
from launch.data.sources.arrow_rows import index_note, is_index
from launch.data.sources.compression import DAMAGED, LONGEST_ROW, damaged, open_data

UNCLOSED = "unexpected end of data"  # the csv module's message for an unclosed quote, and for nothing else


def csv_rows(path: Path) -> Records:
    return _separated(path, ",")


def tsv_rows(path: Path) -> Records:
    return _separated(path, "\t")


class TooLong(Exception):
    """A row has more characters than are kept in memory."""


class Lines:
    """The lines of a file, as `csv.reader` takes them; `row` holds those that the present row has taken."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        # Bytes that are not UTF-8 become lone surrogates, so that only their own row is lost.
        self._text = io.TextIOWrapper(
            cast(IO[bytes], file), encoding="utf-8-sig", errors="surrogateescape", newline=""
        )
        self.before = 0  # lines that precede the present row
        self.row: list[str] = []
        self._size = 0

    def start_row(self) -> None:
        self.before += len(self.row)
        self.row = []
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._text.readline(LONGEST_ROW + 1)
        if not line:
            raise StopIteration
        self._size += len(line)
        self.row.append(line)
        if self._size > LONGEST_ROW:
            self.row[:] = [""] * len(self.row)
            while line and not line.endswith(("\n", "\r")):
                line = self._text.readline(LONGEST_ROW + 1)
            raise TooLong
        return line


def _separated(path: Path, delimiter: str) -> Records:
    with open_data(path) as file:
        lines = Lines(file)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        used: list[bool] = []
        while True:
            lines.start_row()
            where = f"{path}:{lines.before + 1}"
            try:
                row = _next(rows)
            except (csv.Error, TooLong) as error:
                yield Rejected.of(where, _broken(error, lines, delimiter))
                continue
            except DAMAGED as error:
                yield Rejected.of(where, damaged(path, error))
                return
            if row is None:
                return
            if not row:
                continue
            if header is None:
                header = _header(row, path)
                used = [not is_index(name) for name in header]
                yield from index_note(header)
                continue
            try:
                yield Record(_fields(header, used, row), where)
            except Reject as reject:
                yield Rejected.of(where, reject)


def _next(rows: Iterator[list[str]]) -> list[str] | None:
    """Return the next row, None at the end. The limit on a field's length belongs to the whole process."""
    limit = csv.field_size_limit(2 * LONGEST_ROW)
    try:
        return next(rows, None)
    finally:
        csv.field_size_limit(limit)


def _broken(error: Exception, lines: Lines, delimiter: str) -> Reject:
    lost = len(lines.row)
    if isinstance(error, TooLong):
        return Reject("row too long", f"more than {LONGEST_ROW >> 20} MiB: {_lost(lost)} with it")
    if str(error) == UNCLOSED:
        return Reject("broken CSV", _unclosed(lines.row, lines.before, delimiter))
    return Reject("broken CSV", f"{error}, line {lines.before + lost}: {_lost(lost)} with it")


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
    named = header[1:] if header[1:] and not header[0] else header  # pandas writes its index first, without a name
    twice = "" if "" in named else repeated(named)
    if twice is not None:
        found = f"{shortened(repr(twice))} twice" if twice else "a column without a name"
        raise DataError(f"{path}:1 was expected to name each column once, but it holds {found}.")
    return header


def _fields(header: list[str], used: list[bool], row: list[str]) -> dict[str, str]:
    if len(row) != len(header):
        raise Reject("wrong number of columns", f"{len(row)} instead of {len(header)}")
    for value in row:
        if "\0" in value:
            raise Reject("null bytes")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise Reject("not UTF-8") from None
    return dict(compress(zip(header, row, strict=True), used))
