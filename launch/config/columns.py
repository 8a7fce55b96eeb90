"""`--columns prompt=question,completion=answer`: which column of the data is read under which name."""

import json
from collections.abc import Sequence

from launch.common.errors import UserError


def column_names(words: Sequence[str] | None) -> dict[str, str]:
    """Return the column for each name. A recipe may also hold the mapping itself, which arrives as JSON.

    Raises UserError for what is no pair of names, and for a name that is given twice.
    """
    names: dict[str, str] = {}
    for name, column in [pair for word in words or () for pair in _pairs(word)]:
        if not name or not column:
            raise UserError(f"--columns: expected name=column, such as completion=answer, got {name}={column}")
        if names.setdefault(name, column) != column:
            raise UserError(f"--columns: {name} is to be {names[name]} and {column}; name one column")
    return names


def _pairs(word: str) -> list[tuple[str, str]]:
    if word.lstrip().startswith("{"):
        try:
            given = json.loads(word)
        except (ValueError, RecursionError) as error:
            raise UserError(f"--columns is not JSON: {error}") from None
        if not all(isinstance(column, str) for column in given.values()):
            raise UserError("--columns: expected the name of a column for each name")
        return list(given.items())
    pairs = [pair.partition("=") for pair in word.split(",") if pair.strip()]
    if not pairs or any(not sign for _, sign, _ in pairs):
        raise UserError(f"--columns: expected name=column, such as completion=answer, got {word!r}")
    return [(name.strip(), column.strip()) for name, _, column in pairs]
