"""A fingerprint of what files hold, so that what was made of them can be found again."""

from collections.abc import Iterable
from pathlib import Path

import xxhash

from launch.data.records import DataError

BLOCK = 2**20  # bytes


def quick_fingerprint_of_files(files: Iterable[tuple[str, Path]]) -> str:
    """Return one hash over the name, the size, the first and the last block of each file. Raises DataError."""
    whole = xxhash.xxh3_128()
    for name, path in files:
        try:
            size = path.stat().st_size
            with path.open("rb", buffering=0) as file:
                whole.update(file.read(BLOCK))
                file.seek(max(0, size - BLOCK))
                whole.update(file.read(BLOCK))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
        whole.update(f"\0{name}\0{size}\0".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def fingerprint_of_files(files: Iterable[tuple[str, Path]]) -> str:
    """Return one hash over the name, the size and the bytes of each file. Raises DataError if one cannot be read."""
    whole = xxhash.xxh3_128()
    for name, path in files:
        size = 0
        try:
            with path.open("rb", buffering=0) as file:
                while block := file.read(BLOCK):
                    whole.update(block)
                    size += len(block)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
        # after the bytes: their number is known then, and separates one file from the next
        whole.update(f"\0{name}\0{size}\0".encode("utf-8", "surrogateescape"))
    return whole.hexdigest()
