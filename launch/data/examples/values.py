"""Values of a record: text that a tokenizer takes, lists and objects that were written as text, and no value."""

from collections.abc import Mapping
from typing import Any

from launch.common.errors import Reject
from launch.common.strict_json import StrictDecoder

Fields = Mapping[str, Any]
EMPTY = ("", "[]", "{}", "null")  # what a column of text or of JSON texts holds where a row has no value


def text(fields: Fields, name: str) -> str:
    """The text of a field. Raises Reject if there is none."""
    if name not in fields:
        raise Reject(f"no field {name!r}")
    value = fields[name]
    if not isinstance(value, str):
        raise Reject(f"{name} is not text", type(value).__name__)
    return unicode(value, name)


def text_with_words(fields: Fields, name: str) -> str:
    """The text of a field that must not be blank."""
    value = text(fields, name)
    if not value.strip():
        raise Reject(f"empty {name}")
    return value


def optional_text(fields: Fields, *names: str) -> str:
    """The text of the one of these fields that holds some; "" where none does. Raises Reject if two do."""
    name = only_one(fields, *names)
    value = "" if name is None else text(fields, name)
    return value if value.strip() else ""


def only_one(fields: Fields, *names: str) -> str | None:
    """Which of these fields, all of which say the same thing, holds a value. Raises Reject if two do."""
    holding = [name for name in names if holds(fields.get(name))]
    if len(holding) > 1:
        raise Reject(f"both {holding[0]} and {holding[1]}")
    return holding[0] if holding else None


def unicode(value: str, name: str) -> str:
    """Return `value` if it can be encoded as UTF-8, which tokenizers need. Raises Reject otherwise."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        raise Reject(f"{name} holds half a surrogate pair") from None
    return value


def holds(value: Any) -> bool:
    """Whether a value says anything: it is not null, blank or empty, and not an object of nulls."""
    if isinstance(value, str):
        return value.strip() not in EMPTY
    if isinstance(value, dict):
        return any(map(holds, value.values()))
    if isinstance(value, list):
        return bool(value)
    return value is not None and value == value  # a NaN is how pandas writes a missing number


def without_nulls(value: Any) -> Any:
    """A nested value without its null keys: Parquet adds to each object the keys of all others, as nulls."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def nested(fields: Fields, name: str) -> Any:
    """The list or object of a field, which CSV files and many Parquet files hold as JSON text.

    Nulls in an object are absent keys, except in JSON text: nobody but its writer put them there.
    """
    value = fields.get(name)
    return from_json(value, name) if isinstance(value, str) else without_nulls(value)


def from_json(value: str, name: str) -> Any:
    """The value of a JSON text. Raises Reject if it is none."""
    try:
        return StrictDecoder().decode(value)
    except Reject as broken:
        raise Reject(f"{name} is text, but not JSON", str(broken)) from None
