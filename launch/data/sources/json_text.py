"""The text of a JSON file, decoded one value at a time."""

import codecs
import re
from io import BufferedIOBase
from typing import Any

from launch.common.errors import Reject
from launch.common.strict_json import StrictDecoder
from launch.data.sources.compression import DAMAGED, LONGEST_ROW

CHUNK = 2**20  # bytes
SPACE = re.compile(r"[ \t\n\r]*")


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
            end = SPACE.match(self._window, self._at).end()
            self.line += self._window.count("\n", self._at, end)
            self._at = end
            if end < len(self._window) or self._whole:
                return self._window[end : end + 1]
            self._read(CHUNK)

    def skip(self) -> None:
        """Step over the character that `peek` returned."""
        self._at += 1

    def rest_of_line(self) -> bool:
        """Step over what is left of the line, and return whether that is more than white space."""
        more = False
        while (end := self._window.find("\n", self._at)) < 0 and not self._whole:
            more = more or bool(self._window[self._at :].strip())
            self._at = len(self._window)
            self._read(CHUNK)
        end = len(self._window) if end < 0 else end
        more = more or bool(self._window[self._at : end].strip())
        self._at = end
        return more

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
