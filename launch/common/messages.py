"""Text for people: safe on a terminal, in one line, not at length, with the right name beside a wrong one.

What comes from data, from a file's name or from a library may hold anything, and a terminal obeys some of it.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Any

# What moves a cursor, sets a colour or a title (C0 but newline and tab, DEL, C1), or turns the order of what follows.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
BREAKS = re.compile(r"[\t\n\u2028\u2029]")
CPP_STACK = re.compile(r"Exception raised from|frame #0")  # where torch's errors turn to frames of C++


def printable(text: str) -> str:
    """Escape what no terminal should get: controls, and halves of characters. Line breaks and tabs stay."""
    return CONTROLS.sub(_escaped, text).encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text: str) -> str:
    """`printable` text with line breaks and tabs escaped too."""
    return BREAKS.sub(_escaped, printable(text))


def shortened(text: str, limit: int = 80) -> str:
    """`one_line` of text that came with the data, at most `limit` characters of it."""
    line = one_line(text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 3] + "..."


def error_line(error: BaseException, limit: int = 300) -> str:
    """An error's own text in one line without torch's C++ stack; its type if it has no text."""
    text = " ".join(CPP_STACK.split(str(error))[0].split())
    return shortened(text, limit) or type(error).__name__


def typed_error_line(error: BaseException, limit: int = 300) -> str:
    """`error_line` after the error's type: an error of a library often says too little without it."""
    return f"{type(error).__name__}: {error_line(error, limit)}"


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """`; did you mean 'this'?` for the known name nearest to a wrong one, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1) if isinstance(name, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


def counted(count: int, noun: str, plural: str = "") -> str:
    """`1 row`, `2 rows`, `1,000 rows`; a plural that is not made with an s is given."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def listed(noun: str, numbers: Iterable[int]) -> str:
    """`rank 1`, `ranks 1, 3`."""
    numbers = sorted(numbers)
    return f"{noun}{'s' if len(numbers) != 1 else ''} {', '.join(map(str, numbers))}"


def _escaped(character: re.Match) -> str:
    return character[0].encode("unicode_escape").decode("ascii")
