"""JSON with line numbers: JSON lines read one line at a time, lists read one item at a time."""

import codecs
from io import BufferedIOBase
from pathlib import Path
from typing import Any

from launch.common.errors import Reject
from launch.common.strict_json import StrictDecoder
from launch.data.records import DataError, Record, Records, Rejected
from launch.data.sources.compression import BOM, DAMAGED, LONGEST_ROW, damaged, lines_of, open_data

CHUNK = 2**20  # bytes


def json_lines(path: Path) -> Records:
    """Yield each line's record, or its `file:line` and the reason why it is unusable. Detects gzip by content."""
    decoder = StrictDecoder()
    number = 0
    try:
        with open_data(path) as file:
            for number, line in enumerate(lines_of(file), start=1):
                where = f"{path}:{number}"
                try:
                    fields = _parse_line(line.removeprefix(BOM) if number == 1 else line, decoder)
                except Reject as reject:
                    yield Rejected.of(where, reject)
                else:
                    if fields is not None:
                        yield Record(fields, where)
    except DAMAGED as error:
        yield Rejected.of(f"{path}:{number + 1}", damaged(path, error))


def _parse_line(line: bytes, decoder: StrictDecoder) -> dict[str, Any] | None:
    if len(line) > LONGEST_ROW:
        raise Reject("line too long", f"more than {LONGEST_ROW >> 20} MiB")
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


def json_list(path: Path) -> Records:
    """Yield each item of a JSON list, as `json_lines` does. A file that starts with an object is read as JSON lines.

    Raises DataError if the file holds neither.
    """
    try:
        with open_data(path) as file:
            text = JsonText(file)
            first = text.peek()
            if first == "[":
                yield from _items(path, text)
                return
            if first != "{":
                raise DataError(
                    f"{path} was expected to be a list of JSON objects, but it starts with {text.beginning(20)!r}."
                )
    except DAMAGED as error:
        yield Rejected.of(f"{path}:1", damaged(path, error))
        return
    yield from json_lines(path)


def _items(path: Path, text: "JsonText") -> Records:
    text.skip()  # [
    try:
        first = text.peek()
        while first != "]":
            line = text.line
            try:
                value, reject = text.decode()
                following = text.peek()
                if following not in (",", "]"):
                    raise Reject("broken JSON", "expected , or ] after this item")
            except Reject as broken:
                yield Rejected.of(
                    f"{path}:{line}", Reject("broken JSON list, the rest of the file is lost", str(broken))
                )
                return
            yield Rejected.of(f"{path}:{line}", reject) if reject else Record(value, f"{path}:{line}")
            if following == ",":
                text.skip()
            first = text.peek()
        text.skip()
        if text.peek():
            yield Rejected.of(f"{path}:{text.line}", Reject("broken JSON", "extra data after the list"))
    except DAMAGED as error:
        yield Rejected.of(f"{path}:{text.line}", damaged(path, error))


class JsonText:
    """The text of a JSON file, decoded one value at a time, of which only a window is in memory."""

    def __init__(self, file: BufferedIOBase) -> None:
        self._file = file
        # Bytes that are not UTF-8 become lone surrogates, so that only their own item is lost.
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
        self._decoder = StrictDecoder()
        self._window, self._at = "", 0  # the next character is `_window[_at]`
        self._damage: Exception | None = None
        self._whole = False  # the window reaches to the end of the file
        self._escaped = False  # some bytes so far were not UTF-8
        self._column = 0  # characters of the window's first line that are before the window
        self.line = 1  # of the next character

    def peek(self) -> str:
        """Skip white space, and return the next character, "" at the end of the file."""
        while True:
            while (character := self._window[self._at : self._at + 1]) in (" ", "\t", "\n", "\r") and character:
                self.line += character == "\n"
                self._at += 1
            if character or self._whole:
                return character
            self._read(CHUNK)

    def skip(self) -> None:
        """Step over the character that `peek` returned."""
        self._at += 1

    def beginning(self, count: int) -> str:
        """Return at most `count` of the next characters."""
        return self._window[self._at :][:count]

    def decode(self) -> tuple[Any, Reject | None]:
        """Decode the next value. Returns it, and why it is unusable; raises Reject if its end is not found."""
        size = CHUNK
        while True:
            try:
                value, end, reject = self._decoder.decode_at(self._window, self._at, self._column)
                if end < len(self._window) or self._whole:  # a number may go on
                    break
            except Reject:
                if self._whole or len(self._window) - self._at > LONGEST_ROW:
                    raise
            self._read(size)
            size *= 2  # what has been decoded in vain is at most twice what there is
        decoded = self._window[self._at : end]
        if self._escaped and any("\udc80" <= character <= "\udcff" for character in decoded):
            reject = Reject("not UTF-8")
        self.line += self._window.count("\n", self._at, end)
        self._at = end
        return value, reject

    def _read(self, size: int) -> None:
        """Read more of the file, and forget what lies before the next character."""
        newline = self._window.rfind("\n", 0, self._at)
        self._column = self._at - newline - 1 if newline >= 0 else self._column + self._at
        if self._damage:
            raise self._damage
        content = self._bytes(size)
        self._whole = not content and self._damage is None
        text = self._utf8.decode(content, final=self._whole)
        self._escaped = self._escaped or not _is_unicode(text)
        self._window, self._at = self._window[self._at :] + text, 0

    def _bytes(self, size: int) -> bytes:
        """Read `size` bytes, fewer where the file ends or is damaged."""
        parts: list[bytes] = []
        try:
            while size > 0 and (part := self._file.read1(size)):
                parts.append(part)
                size -= len(part)
        except DAMAGED as error:
            self._damage = error  # raised once what precedes it is used
        return b"".join(parts)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
