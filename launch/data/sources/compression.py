"""Data files as bytes and as lines, whether they are compressed or not; what to say of one that is damaged."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from launch.common.errors import Reject

GZIP_MAGIC = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"
LONGEST_ROW = 2**26  # bytes
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)


def open_data(path: Path) -> IO[bytes]:
    """Open a file for reading its bytes; gzip is recognised by content."""
    with path.open("rb") as file:
        compressed = file.read(2) == GZIP_MAGIC
    return cast(IO[bytes], gzip.open(path, "rb")) if compressed else path.open("rb")


def damaged(path: Path, error: Exception) -> Reject:
    """Return why the rest of a compressed file is not read."""
    return Reject("damaged gzip, the rest of the file is lost", str(error))


def lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file, each cut after `LONGEST_ROW` + 1 bytes so that memory is bounded."""
    while line := file.readline(LONGEST_ROW + 1):
        yield line
        while len(line) > LONGEST_ROW and not line.endswith(b"\n"):
            line = file.readline(LONGEST_ROW + 1)
