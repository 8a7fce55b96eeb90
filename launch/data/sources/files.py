"""From a path or a hub name to records, each with its `file:line`."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from launch.common.errors import Reject
from launch.common.messages import shortened
from launch.common.strict_json import repeated
from launch.data.records import DataError, DropReport, Record
from launch.data.sources.directory import files_of
from launch.data.sources.json_files import GZIP_MAGIC, json_lines, json_list

BINARY_MAGIC = (b"\x89PNG", b"PK\x03\x04", b"\x7fELF", b"%PDF", b"\xff\xd8\xff", b"\x80\x02", b"\x80\x04")
UNCLOSED = "unexpected end of data"  # what csv says of nothing but a quote
TEXT_CONTROLS = b"\t\n\r\f\b\x1b"


def read_records(source: str, report: DropReport, strict: bool = False, held_out: bool = False) -> list[Record]:
    """Records of a file, of a directory of files, or of a hub data set (`name:split`, `name:config:split`).

    Bad rows go into `report`, and so does what is not read of a directory; `held_out`: these records are to be
    evaluated on. Raises DataError for a source without records, or when `strict` for the first bad row.
    """
    path = _as_path(source)
    if path is None:
        return _read_hub(source)
    if path.is_dir():
        return _read_directory(path, report, strict, held_out)
    return _read_file(path, report, strict)


def _as_path(source: str) -> Path | None:
    """The path that `source` names, None for a hub name. Raises DataError for a path that is not there."""
    try:
        path = Path(source).expanduser()
        if source and path.exists():
            return path
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{source[:80]!r} is not a usable path ({error}).") from None
    name = source.split(":")[0]
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or _reader(path) is not None
    if looks_like_path or not name.strip():
        raise DataError(f"{source!r} should be a data file or directory, but there is none; check it.")
    return None


def _reader(path: Path):
    if path.name.lower().endswith((".jsonl.gz", ".ndjson.gz")):
        return json_lines
    return READERS.get(path.suffix.lower())


def _read_file(path: Path, report: DropReport, strict: bool) -> list[Record]:
    reader = _reader(path)
    if reader is None:
        raise DataError(f"{path}: expected {', '.join(READERS)} or .jsonl.gz; rename or convert it.")
    try:
        _refuse_binary(path)
        records = []
        rows = 0
        for row in reader(path):
            rows += 1
            if isinstance(row, Record):
                records.append(row)
            else:
                report.add(*row, strict)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not rows:
        raise DataError(f"{path} was expected to hold records, but it holds none.")
    return records


def _refuse_binary(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path} was expected to be a regular file.")
    with path.open("rb") as file:
        head = file.read(4096)
    if not head:
        raise DataError(f"{path} was expected to hold records, but it is empty.")
    compressed = head.startswith(GZIP_MAGIC)
    if compressed and _reader(path) is not json_lines:
        raise DataError(f"{path} holds gzip; unpack it, or name it .jsonl.gz if it holds JSON lines.")
    if _reader(path) is _parquet:
        return
    if path.suffix.lower() == ".gz" and not compressed:
        raise DataError(f"{path} was expected to be gzip, but it is not; remove .gz or compress it.")
    controls = sum(byte < 32 and byte not in TEXT_CONTROLS for byte in head)
    if head.startswith(BINARY_MAGIC) or (not compressed and controls > len(head) // 10):
        raise DataError(f"{path} was expected to be UTF-8 text, but it is binary or UTF-16; convert it.")


def _read_directory(folder: Path, report: DropReport, strict: bool, held_out: bool) -> list[Record]:
    """All data files below `folder` in sorted order; one without records, or of another kind, is a rejection."""
    files = files_of(folder, lambda path: _reader(path) is not None, report, strict, held_out)
    records = []
    for file in files:
        try:
            records += _read_file(file, report, strict)
        except DataError as error:
            if strict or len(files) == 1:
                raise
            report.add(f"{file}:1", Reject("unusable file", str(error), whole_file=True))
    return records


def _parquet(path: Path) -> Iterator[Record]:
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


def _csv(path: Path) -> Iterator[Record | tuple[str, Reject]]:
    return _separated(path, ",")


def _tsv(path: Path) -> Iterator[Record | tuple[str, Reject]]:
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
                yield Record(_csv_fields(header, row), where)
            except Reject as reject:
                yield where, reject
    finally:
        csv.field_size_limit(limit)


def _unclosed(lines: list[str], before: int, delimiter: str) -> str:
    """Where the quote is opened that is never closed in the last `lines` of a file, and what it costs."""
    # read with forgiveness, its field is the last one and reaches to the end
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


def _csv_fields(header: list[str], row: list[str]) -> dict[str, str]:
    if len(row) != len(header):
        raise Reject("wrong number of columns", f"{len(row)} instead of {len(header)}")
    for value in row:
        if "\0" in value:
            raise Reject("null bytes")
        if any("\udc80" <= character <= "\udcff" for character in value):
            raise Reject("not UTF-8")
    return dict(zip(header, row, strict=True))


def _read_hub(source: str) -> list[Record]:
    import datasets  # seconds to import, and only hub names need it here

    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) > 1 else None
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub client raises many unrelated kinds
        raise DataError(
            f"{source!r} is no file here and could not be loaded from the hub as data set {name!r}, split "
            f"{split!r} ({type(error).__name__}: {error}); check the name (name:split or name:config:split) "
            "and the network, or give a local file."
        ) from error
    records = [Record(dict(row), f"{source}:{number}") for number, row in enumerate(rows, start=1)]
    if not records:
        raise DataError(f"{source!r} was expected to hold records, but it holds none.")
    return records


READERS = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_list,
    ".parquet": _parquet,
    ".csv": _csv,
    ".tsv": _tsv,
}
