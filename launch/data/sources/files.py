"""Reading of records from a source: a file with the reader for its type, a directory of files, or a hub name."""

from collections.abc import Callable, Iterator
from pathlib import Path

from launch.common.errors import Reject
from launch.data.records import DataError, DropReport, Record
from launch.data.sources.csv_files import csv_rows, tsv_rows
from launch.data.sources.directory import files_of
from launch.data.sources.hub import read_hub
from launch.data.sources.json_files import GZIP_MAGIC, json_lines, json_list
from launch.data.sources.parquet_files import parquet_rows

# yields a record for each row; for an unusable row, its file:line and the reason
Reader = Callable[[Path], Iterator[Record | tuple[str, Reject]]]
BINARY_MAGIC = (b"\x89PNG", b"PK\x03\x04", b"\x7fELF", b"%PDF", b"\xff\xd8\xff", b"\x80\x02", b"\x80\x04")
TEXT_CONTROLS = b"\t\n\r\f\b\x1b"


def read_records(source: str, report: DropReport, strict: bool = False, held_out: bool = False) -> list[Record]:
    """Read the records of a file, a directory of files, or a hub data set (`name:split`, `name:config:split`).

    Bad rows go into `report`, and so do files of a directory that are not read. `held_out`: these records are for
    evaluation. Raises DataError for a source without records, or when `strict` for the first bad row.
    """
    path = _as_path(source)
    if path is None:
        return read_hub(source)
    if path.is_dir():
        return _read_directory(path, report, strict, held_out)
    return _read_file(path, report, strict)


def _as_path(source: str) -> Path | None:
    """Return the path that `source` names, None for a hub name. Raises DataError for a path that does not exist."""
    try:
        path = Path(source).expanduser()
        if source and path.exists():
            return path
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{source[:80]!r} is not a usable path ({error}).") from None
    name = source.split(":")[0]
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or _reader(path) is not None
    if looks_like_path or not name.strip():
        raise DataError(
            f"{source!r} was expected to be a data file or directory, but does not exist; check the path."
        )
    return None


def _reader(path: Path) -> Reader | None:
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
        beginning = file.read(4096)
    if not beginning:
        raise DataError(f"{path} was expected to hold records, but it is empty.")
    compressed = beginning.startswith(GZIP_MAGIC)
    if compressed and _reader(path) is not json_lines:
        raise DataError(f"{path} holds gzip; unpack it, or name it .jsonl.gz if it holds JSON lines.")
    if _reader(path) is parquet_rows:
        return
    if path.suffix.lower() == ".gz" and not compressed:
        raise DataError(f"{path} was expected to be gzip, but it is not; remove .gz or compress it.")
    controls = sum(byte < 32 and byte not in TEXT_CONTROLS for byte in beginning)
    if beginning.startswith(BINARY_MAGIC) or (not compressed and controls > len(beginning) // 10):
        raise DataError(f"{path} was expected to be UTF-8 text, but it is binary or UTF-16; convert it.")


def _read_directory(folder: Path, report: DropReport, strict: bool, held_out: bool) -> list[Record]:
    """Read all data files under `folder` in sorted order; an unusable file is rejected unless it is the only one."""
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


READERS: dict[str, Reader] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_list,
    ".parquet": parquet_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
}
