"""JSON files of any shape, with line numbers: lists and one object's list are read one item at a time."""

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from launch.common.errors import Reject
from launch.common.messages import shortened
from launch.common.strict_json import BrokenJson
from launch.data.examples.formats import detect_format
from launch.data.records import DataError, Note, Record, Records, Rejected
from launch.data.sources.compression import DAMAGED, damaged, open_data
from launch.data.sources.json_lines import is_message, json_lines, objects_in
from launch.data.sources.json_text import JsonText

MOST_NAMES = 10_000  # of an object around a list


class BrokenItem(Exception):
    """The end of a list's item, which begins at `line`, is not found."""

    def __init__(self, line: int, reject: Reject) -> None:
        super().__init__(str(reject))
        self.line, self.reject = line, reject


def json_rows(path: Path) -> Records:
    """Yield the rows of a file that holds JSON lines, lists of rows, or one object with a list of rows in it.

    Raises DataError if it is one object with several lists.
    """
    by_lines: int | None = 1  # the line from which on the file is read as lines
    with open_data(path) as file:
        text = JsonText(file)
        try:
            beginning = text.peek()
            if beginning == "[":
                by_lines = yield from _list(path, text)
            elif beginning == "{":
                name, others = _wrapped_list(path, text)
                if name is not None:
                    by_lines = None
                    more = f"; not read: {shortened(', '.join(others))}" if others else ""
                    yield Note(
                        f"{path} holds one JSON object: its list {shortened(repr(name))} is read as rows{more}"
                    )
                    yield from _list_of(path, name)
        except DAMAGED as error:
            yield Rejected.of(f"{path}:{text.line}", damaged(path, error))
            return
    if by_lines is not None:
        yield from json_lines(path, by_lines - 1)


def _list(path: Path, text: JsonText) -> Generator[Record | Rejected | Note, None, int | None]:
    """Yield the rows of the list that comes next. Returns the line of what follows the list, None if nothing does."""
    start = text.line
    try:
        yield from _items(path, text)
    except BrokenItem as broken:
        if text.line == start:
            text.rest_of_line()
        if text.peek() == "[" and broken.line == start < text.line:  # a list a line
            yield Rejected.of(f"{path}:{start}", broken.reject)
            return text.line
        lost = Reject("broken JSON list, the rest of the file is lost", str(broken))
        yield Rejected.of(f"{path}:{broken.line}", lost)
        return None
    if text.rest_of_line():
        yield Rejected.of(f"{path}:{text.line}", Reject("broken JSON", "extra data after the list"))
    return text.line if text.peek() else None


def _list_of(path: Path, name: str) -> Records:
    """Yield the rows of the list called `name` in the object that the file begins with."""
    with open_data(path) as file:
        text = JsonText(file)
        text.peek()
        try:
            for member in _members(text):
                if member == name:
                    yield from _items(path, text)
                    return
                for _ in _values(text) if text.peek() == "[" else [text.decode()]:
                    pass
        except BrokenItem as broken:
            lost = Reject("broken JSON list, the rest of the file is lost", str(broken))
            yield Rejected.of(f"{path}:{broken.line}", lost)
        except DAMAGED as error:
            yield Rejected.of(f"{path}:{text.line}", damaged(path, error))


def _wrapped_list(path: Path, text: JsonText) -> tuple[str | None, list[str]]:
    """Return the name of the one list of objects in the file's one object, and those of its other members.

    The name is None if the file is to be read as lines: it holds more than one value, or its object is itself a row.
    Raises DataError for several lists.
    """
    start = text.line
    filled: dict[str, bool | None] = {}
    lists = []
    try:
        for name in _members(text):
            if len(filled) > MOST_NAMES:
                return None, []
            if text.peek() != "[":
                filled[name] = None if text.decode()[0] is None else True
                continue
            filled[name] = True
            for number, (_, item, _) in enumerate(_values(text)):
                if number == 0 and isinstance(item, dict):
                    if is_message(item):
                        return None, []
                    lists.append(name)
        if text.peek():
            return None, []
    except (BrokenItem, BrokenJson, *DAMAGED):
        if text.line == start:  # most likely one broken line among others
            return None, []
    if not lists or detect_format(filled) is not None:
        return None, []
    if len(lists) > 1:
        raise DataError(
            f"{path} holds one JSON object with several lists of objects ({shortened(', '.join(lists))}), but "
            "one list of rows was expected. Write the rows to train on into a file of their own."
        )
    return lists[0], [name for name in filled if name != lists[0]]


def _items(path: Path, text: JsonText) -> Records:
    for line, value, reject in _values(text):
        where = f"{path}:{line}"
        try:
            for fields in objects_in(value, reject):
                yield Record(fields, where)
        except Reject as unusable:
            yield Rejected.of(where, unusable)


def _values(text: JsonText) -> Iterator[tuple[int, Any, Reject | None]]:
    """Yield the items of the list that comes next: the line, the value, and why it is unusable.

    Raises BrokenItem for one whose end is not found.
    """
    text.peek()
    text.skip()  # [
    while text.peek() != "]":
        line = text.line
        try:
            value, reject = text.decode()
            following = text.peek()
            if following not in (",", "]"):
                raise BrokenJson("expected , or ] after this item")
        except BrokenJson as broken:
            raise BrokenItem(line, broken) from None
        yield line, value, reject
        if following == ",":
            text.skip()
    text.skip()


def _members(text: JsonText) -> Iterator[str]:
    """Yield the names in the object that comes next; who iterates takes each one's value. Raises BrokenJson."""
    text.skip()  # {
    while text.peek() != "}":
        name, _ = text.decode()
        if not isinstance(name, str) or text.peek() != ":":
            raise BrokenJson("expected a name and a colon")
        text.skip()
        yield name
        following = text.peek()
        if following == ",":
            text.skip()
        elif following != "}":
            raise BrokenJson("expected , or } after this value")
    text.skip()
