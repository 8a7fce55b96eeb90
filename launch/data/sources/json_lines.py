"""JSON lines: an object a line, an object over several lines, or a list of objects a line."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.common.errors import Reject
from launch.common.strict_json import NOT_AN_OBJECT, BrokenJson, StrictDecoder
from launch.data.records import Record, Records, Rejected
from launch.data.sources.compression import BOM, DAMAGED, LONGEST_ROW, damaged, lines_of, open_data

MOST_LINES = 2**20  # of one object


def json_lines(path: Path, after: int = 0) -> Records:
    """Yield the records of each line but the first `after`; for an unusable line its `file:line` and the reason."""
    decoder = StrictDecoder()
    with open_data(path) as file:
        lines = Lines(lines_of(file))
        try:
            for line in lines:
                if lines.number <= after:
                    continue
                where = f"{path}:{lines.number}"
                try:
                    for fields in _objects(line.removeprefix(BOM) if lines.number == 1 else line, lines, decoder):
                        yield Record(fields, where)
                except Reject as reject:
                    yield Rejected.of(where, reject)
        except DAMAGED as error:
            yield Rejected.of(f"{path}:{lines.number + 1}", damaged(path, error))


class Lines:
    """The lines of a file, some of which can be looked at before their turn; `number` of them are taken."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines, self._ahead = lines, deque[bytes]()
        self._damage: Exception | None = None
        self.number = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if not self.ahead(1):
            if self._damage:
                raise self._damage
            raise StopIteration
        self.number += 1
        return self._ahead.popleft()

    def ahead(self, count: int) -> list[bytes]:
        """Return the next `count` lines, fewer where the file ends or is damaged."""
        try:
            while len(self._ahead) < count and not self._damage and (line := next(self._lines, None)) is not None:
                self._ahead.append(line)
        except DAMAGED as error:
            self._damage = error  # raised once the lines before it are taken
        return [self._ahead[index] for index in range(min(count, len(self._ahead)))]


def _objects(line: bytes, lines: Lines, decoder: StrictDecoder) -> list[dict[str, Any]]:
    """Return the objects of the value that begins on `line`; takes the other lines of the value from `lines`."""
    text = _text(line)
    if not text:
        return []
    try:
        value, end, reject = decoder.decode_at(text)
    except BrokenJson as broken:
        if not broken.incomplete or text[0] not in "{[":
            raise
        text, value, end, reject = _over_lines(line, text, lines, decoder, broken)
    if text[end:].strip():
        raise Reject("broken JSON", f"extra data, column {end - text.rfind(chr(10), 0, end)}")
    return objects_in(value, reject)


def _text(line: bytes, indented: bool = False) -> str:
    if len(line) > LONGEST_ROW:
        raise Reject("line too long", f"more than {LONGEST_ROW >> 20} MiB")
    if b"\0" in line:
        raise Reject("null bytes")
    try:
        text = line.decode("utf-8").rstrip()
    except UnicodeDecodeError as error:
        raise Reject("not UTF-8", f"byte {error.start + 1}") from None
    return text if indented else text.lstrip()


def _over_lines(
    line: bytes, first: str, lines: Lines, decoder: StrictDecoder, incomplete: BrokenJson
) -> tuple[str, Any, int, Reject | None]:
    """Decode a value of which `line` is only the beginning. Raises Reject if its end is not found."""
    count = 1
    while True:
        following = lines.ahead(count)
        try:
            text = "\n".join([first, *(_text(further, indented=True) for further in following)])
            value, end, reject = decoder.decode_at(text)
        except Reject as broken:
            more_lines = len(following) == count < MOST_LINES and sum(map(len, following)) < LONGEST_ROW
            if isinstance(broken, BrokenJson) and broken.incomplete and more_lines:
                count *= 2  # what has been decoded in vain is at most twice what there is
                continue
            at = f" of line {lines.number + broken.line}" if isinstance(broken, BrokenJson) else ""
            lost = _skip(line, lines)
            if not lost:
                raise incomplete from None
            raise Reject(broken.reason, f"{broken.detail}{at}: {lost + 1} lines are lost with it") from None
        for _ in range(text.count("\n", 0, end)):
            next(lines)
        return text[: text.find("\n", end) % (len(text) + 1)], value, end, reject


def _skip(line: bytes, lines: Lines) -> int:
    """Take lines until one that may begin another value, no deeper than `line`. Return how many are not blank."""
    lost = 0
    while following := lines.ahead(1):
        begins = following[0].lstrip()[:1] in (b"{", b"[")
        if begins and _indentation(following[0]) <= _indentation(line):
            break
        lost += bool(next(lines).strip())
    return lost


def _indentation(line: bytes) -> int:
    return len(line) - len(line.lstrip())


def objects_in(value: Any, reject: Reject | None) -> list[dict[str, Any]]:
    """Return an object, or the objects of a list. Raises Reject, as the decoder gave it, for anything else."""
    if reject is None:
        return [value]
    is_list = isinstance(value, list) and reject.reason == NOT_AN_OBJECT
    if not is_list or not value or not all(isinstance(item, dict) for item in value):
        raise reject
    if any(map(is_message, value)):
        raise Reject("a list of messages is not a row", 'expected {"messages": [...]}')
    return value


def is_message(value: dict[str, Any]) -> bool:
    """Whether an object is one message of a conversation, and so not a row of its own."""
    return "role" in value or "from" in value
