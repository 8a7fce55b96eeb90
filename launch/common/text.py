"""Text for people. What comes from data or from a file's name may hold anything; a terminal obeys some of it."""

import re

# What moves a cursor, sets a colour or a title (C0 but newline and tab, DEL, C1), or turns the order of what follows.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
BREAKS = re.compile(r"[\t\n\u2028\u2029]")


def printable(text: str) -> str:
    """Lines of text with an escape for what no terminal should get: controls, and halves of characters."""
    return CONTROLS.sub(_escaped, text).encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text: str) -> str:
    """`printable` text with an escape for each line break and tab too."""
    return BREAKS.sub(_escaped, printable(text))


def shortened(text: str, limit: int = 80) -> str:
    """The one line of something that came with the data, at most `limit` characters of it."""
    line = one_line(text[: limit + 1])
    return line if len(line) <= limit else line[: limit - 3] + "..."


def first_line(fault: Exception) -> str:
    """What an error says, without what libraries add to it; its type if it says nothing."""
    lines = str(fault).strip().splitlines()
    return lines[0] if lines else type(fault).__name__


def _escaped(character: re.Match) -> str:
    return character[0].encode("unicode_escape").decode("ascii")
