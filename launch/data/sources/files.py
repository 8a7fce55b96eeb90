"""Reading of records from a source: a file with the reader for its type, a directory of files, or a hub name."""

import os
from collections.abc import Callable
from pathlib import Path

from launch.data.records import DataError, Note, Records, Rejected
from launch.data.sources.compression import DAMAGED, SUFFIXES, compression_of, open_data
from launch.data.sources.csv_files import csv_rows, tsv_rows
from launch.data.sources.directory import files_of
from launch.data.sources.fingerprint import fingerprint_of_files, quick_fingerprint_of_files
from launch.data.sources.hub import HubName, hub_fingerprint, hub_name_problem, hub_pinned, hub_rows, without_revision
from launch.data.sources.json_files import json_rows
from launch.data.sources.parquet_files import parquet_rows
from launch.data.sources.saved import is_saved, saved_files, saved_rows

Reader = Callable[[Path], Records]
BINARY_MAGIC = (b"\x89PNG", b"PK\x03\x04", b"\x7fELF", b"%PDF", b"\xff\xd8\xff", b"\x80\x02", b"\x80\x04")
TEXT_CONTROLS = b"\t\n\r\f\b\x1b"


def iter_records(source: str, held_out: bool = False, streamed: bool = False) -> Records:
    """Yield the rows of a file, a directory, or a hub data set (`name[@revision][:config][:split]`).

    Never more than a batch of them is in memory. Rows and files that cannot be used are yielded as Rejected, and what
    to tell the user about the rest as Note. `held_out`: these records are for evaluation. `streamed`: a hub data set
    is read from the hub, and not written to disk first.

    Raises DataError for a source that does not exist, and on the way for one that holds no rows or cannot be read.
    """
    path = _as_path(source)
    if path is None:
        return _at_least_one(source, hub_rows(source, streamed))
    if path.is_dir() and not is_saved(path):
        return _directory_rows(path, held_out)
    return _file_rows(path)


def source_fingerprint(source: str, held_out: bool = False, streamed: bool = False) -> str:
    """Return a hash of what `iter_records` would read: the names and contents of the files, or the hub data set.

    Of files that are `streamed`, only sizes, beginnings and ends are read.

    Raises DataError if the source does not exist, or one of its files cannot be read.
    """
    path = _as_path(source)
    if path is None:
        return hub_fingerprint(source)
    of_files = quick_fingerprint_of_files if streamed else fingerprint_of_files
    if not path.is_dir():
        return of_files([(path.name, path)])
    found = [path] if is_saved(path) else files_of(path, _is_data, held_out)[0]
    files = [file for entry in found for file in (saved_files(entry) if entry.is_dir() else [entry])]
    return of_files((file.relative_to(path).as_posix(), file) for file in files)


def name_of(source: str) -> str:
    """Return the name of a source in logs: of a hub data set without its revision, so that it is that of any."""
    try:
        return source if _as_path(source) is not None else without_revision(source)
    except DataError:  # it is told once the source is read
        return source


def pinned(source: str) -> str:
    """Return a name under which every rank reads the same: of a hub data set that with its commit."""
    return hub_pinned(source) if _as_path(source) is None else source


def _as_path(source: str) -> Path | None:
    """Return the path that `source` names, None for a hub name. Raises DataError for a path that does not exist."""
    try:
        path = Path(source).expanduser()
        if source and path.exists():
            return path
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{source[:80]!r} is not a usable path ({error}).") from None
    name = HubName.of(source).name
    looks_like_path = source.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
    if looks_like_path or _reader(path) is not None or not name.strip():
        parts = source.split(",")
        several = len(parts) > 1 and all(os.path.exists(part) for part in parts)
        what = f"separate several by spaces: {' '.join(parts)}" if several else "check the path"
        raise DataError(f"{source!r} was expected to be a data file or directory, but does not exist; {what}.")
    problem = hub_name_problem(source)
    if problem:
        raise DataError(problem)
    return None


def _reader(path: Path) -> Reader | None:
    name = path.name.lower()
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        return READERS.get(suffix)
    reader = READERS.get(Path(name.removesuffix(suffix)).suffix)
    return None if reader is parquet_rows else reader  # Parquet compresses its columns


def _is_data(path: Path) -> bool:
    return _reader(path) is not None


def _file_rows(path: Path) -> Records:
    """Yield the rows of a file or a saved data set. Raises DataError if it holds none, or cannot be read."""
    if is_saved(path):
        yield from _at_least_one(path, saved_rows(path))
        return
    reader = _reader(path)
    if reader is None:
        raise DataError(
            f"{path}: expected {', '.join(READERS)}, or .gz or .zst after one of them; rename or convert it."
        )
    try:
        _refuse_binary(path)
        yield from _at_least_one(path, reader(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _at_least_one(source: str | Path, rows: Records) -> Records:
    found = False
    for row in rows:
        found = found or not isinstance(row, Note)
        yield row
    if not found:
        raise DataError(f"{source} was expected to hold records, but it holds none.")


def _refuse_binary(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path} was expected to be a regular file.")
    if not path.stat().st_size:
        raise DataError(f"{path} was expected to hold records, but it is empty.")
    compression = compression_of(path)
    if _reader(path) is parquet_rows:
        if compression:
            raise DataError(f"{path} holds {compression}; unpack it.")
        return
    suffix = path.suffix.lower()
    if suffix in SUFFIXES and not compression:
        raise DataError(
            f"{path} was expected to be {SUFFIXES[suffix]}, but it is not; remove {suffix} or compress it."
        )
    try:
        with open_data(path) as file:
            beginning = file.read(4096)
    except DAMAGED:
        return  # the reader says so, and reads what it can
    controls = sum(byte < 32 and byte not in TEXT_CONTROLS for byte in beginning)
    if beginning.startswith(BINARY_MAGIC) or controls > len(beginning) // 10:
        raise DataError(f"{path} was expected to be UTF-8 text, but it is binary or UTF-16; convert it.")


def _directory_rows(folder: Path, held_out: bool) -> Records:
    """Yield the rows of all data files under `folder` in sorted order.

    An unusable file is rejected unless it is the only one.
    """
    files, others = files_of(folder, _is_data, held_out)
    yield from others
    said = set()
    for file in files:
        try:
            for row in _file_rows(file):
                if not isinstance(row, Note):
                    yield row
                elif row not in said:
                    said.add(row)
                    yield row
        except DataError as error:
            if len(files) == 1:
                raise
            yield Rejected(f"{file}:1", "unusable file", str(error), whole_file=True)


READERS: dict[str, Reader] = {
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".json": json_rows,
    ".parquet": parquet_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
}
