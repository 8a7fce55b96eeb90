"""Data files as bytes and as lines, compressed or not; what to say of a compressed one that is damaged."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow

from launch.common.errors import Reject
from launch.common.messages import error_line

MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
SUFFIXES = {".gz": "gzip", ".zst": "zstd"}
BOM = b"\xef\xbb\xbf"
LONGEST_ROW = 2**26  # bytes
STEP = 2**14  # bytes; Arrow keeps nothing of a read in which it meets damage


class DamagedZstd(Exception):
    """What is compressed with zstd cannot be read to its end."""


DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, DamagedZstd)


def compression_of(path: Path) -> str | None:
    """Return how a file is compressed, by its content; None if it is not."""
    with path.open("rb") as file:
        beginning = file.read(4)
    return next((name for magic, name in MAGIC.items() if beginning.startswith(magic)), None)


def open_data(path: Path) -> io.BufferedIOBase:
    """Open a file for reading its bytes, which are decompressed."""
    compression = compression_of(path)
    if compression == "gzip":
        return gzip.open(path, "rb")
    if compression == "zstd":
        return io.BufferedReader(ZstdFile(path), 2**16)
    return path.open("rb")


class ZstdFile(io.RawIOBase):
    """A file that is decompressed by Arrow, whose errors for damage are those for a disk that cannot be read."""

    def __init__(self, path: Path) -> None:
        self._stream = pyarrow.input_stream(str(path), compression="zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            return self._stream.readinto(memoryview(buffer)[:STEP])
        except (OSError, pyarrow.ArrowException) as error:
            raise DamagedZstd(error_line(error)) from error

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def damaged(path: Path, error: Exception) -> Reject:
    """Return why the rest of a compressed file is not read."""
    return Reject(f"damaged {compression_of(path)}, the rest of the file is lost", error_line(error, 80))


def lines_of(file: io.BufferedIOBase) -> Iterator[bytes]:
    """Yield the lines of a file, each cut after `LONGEST_ROW` + 1 bytes so that memory is bounded."""
    while line := file.readline(LONGEST_ROW + 1):
        yield line
        while len(line) > LONGEST_ROW and not line.endswith(b"\n"):
            line = file.readline(LONGEST_ROW + 1)
