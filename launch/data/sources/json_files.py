"""JSON with line numbers: JSON lines read one line at a time, lists read one item at a time."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from launch.common.errors import Reject
from launch.common.strict_json import StrictDecoder
from launch.data.records import DataError, Record

GZIP_MAGIC = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"
LONGEST_LINE = 2**26  # bytes


def json_lines(path: Path) -> Iterator[Record | tuple[str, Reject]]:
    """Yield each line's record, or its `file:line` and the reason why it is unusable. Detects gzip by content."""
    decoder = StrictDecoder()
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(_lines(file), start=1):
                where = f"{path}:{number}"
                try:
                    fields = _parse_line(line.removeprefix(BOM) if number == 1 else line, decoder)
                except Reject as reject:
                    yield where, reject
                else:
                    if fields is not None:
                        yield Record(fields, where)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield f"{path}:{number + 1}", Reject("damaged gzip, the rest of the file is lost", str(error))


def _open(path: Path):
    with path.open("rb") as file:
        compressed = file.read(2) == GZIP_MAGIC
    return gzip.open(path, "rb") if compressed else path.open("rb")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file, each cut after `LONGEST_LINE` + 1 bytes so that memory is bounded."""
    while line := file.readline(LONGEST_LINE + 1):
        yield line
        while len(line) > LONGEST_LINE and not line.endswith(b"\n"):
            line = file.readline(LONGEST_LINE + 1)


def _parse_line(line: bytes, decoder: StrictDecoder) -> dict[str, Any] | None:
    if len(line) > LONGEST_LINE:
        raise Reject("line too long", f"more than {LONGEST_LINE >> 20} MiB")
    if b"\0" in line:
        raise Reject("null bytes")
    try:
        text = line.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise Reject("not UTF-8", f"byte {error.start + 1}") from None
    if not text:
        return None
    value, end, reject = decoder.decode_at(text)
    if text[end:].strip():
        raise Reject("broken JSON", f"extra data, column {end + 1}")
    if reject:
        raise reject
    return value


def json_list(path: Path) -> Iterator[Record | tuple[str, Reject]]:
    """Yield each item of a JSON list, as `json_lines` does. A file that starts with an object is read as JSON lines.

    Raises DataError if the file is not UTF-8 or not a list.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start + 1}); re-encode it.") from None
    start = _skip_space(text, 0)
    if text[start : start + 1] == "{":
        yield from json_lines(path)
        return
    if text[start : start + 1] != "[":
        raise DataError(
            f"{path} was expected to be a list of JSON objects, but it starts with {text[start:][:20]!r}."
        )
    decoder = StrictDecoder()
    position, line, counted = _skip_space(text, start + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        where = f"{path}:{line}"
        try:
            value, end, reject = decoder.decode_at(text, position)
            position = _skip_space(text, end)
            if text[position : position + 1] not in (",", "]"):
                raise Reject("broken JSON", "expected , or ] after this item")
        except Reject as broken:
            yield where, Reject("broken JSON list, the rest of the file is lost", str(broken))
            return
        yield (where, reject) if reject else Record(value, where)
        if text[position] == ",":
            position = _skip_space(text, position + 1)
    if text[position + 1 :].strip():
        line += text.count("\n", counted, position)
        yield f"{path}:{line}", Reject("broken JSON", "extra data after the list")


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position
