"""JSON as its writer meant it: no key twice, no NaN, no infinity, a bound on depth and digits."""

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from launch.common.errors import Reject
from launch.common.messages import shortened

NOT_AN_OBJECT = "not a JSON object"


class BrokenJson(Reject):
    """Text is not JSON.

    `line`: the line breaks before the error. `incomplete`: the text may be right up to its end.
    """

    def __init__(self, detail: str, line: int = 0, incomplete: bool = False) -> None:
        super().__init__("broken JSON", detail)
        self.line, self.incomplete = line, incomplete


class StrictDecoder:
    """A JSON decoder that also notices duplicate keys, NaN and infinity."""

    def __init__(self) -> None:
        self._unusable: list[Reject] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._pairs, parse_constant=self._constant)

    def decode(self, text: str) -> Any:
        """Decode a text that is one value of any type. Raises Reject if it is anything else, or unusable."""
        text = text.strip()
        value, end = self._decode_at(text, 0, 0)
        if text[end:].strip():
            raise Reject("broken JSON", f"extra data, column {end + 1}")
        if self._unusable:
            raise self._unusable[0]
        return value

    def decode_at(self, text: str, start: int = 0, column: int = 0) -> tuple[Any, int, Reject | None]:
        """Decode the object at `start`; `column` is how many characters of its first line precede `text`.

        Returns: the value, the position behind it, and why it is unusable (None if it is an object that is usable).
        Raises: BrokenJson if it is unknown where the value ends.
        """
        value, end = self._decode_at(text, start, column)
        if self._unusable:
            return value, end, self._unusable[0]
        if not isinstance(value, dict):
            return value, end, Reject(NOT_AN_OBJECT, type(value).__name__)
        return value, end, None

    def _decode_at(self, text: str, start: int, column: int) -> tuple[Any, int]:
        self._unusable.clear()
        try:
            return self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            at = error.colno + column * (error.lineno == 1)
            incomplete = not text[error.pos :].strip()
            raise BrokenJson(f"{error.msg}, column {at}", error.lineno - 1, incomplete) from None
        except RecursionError:
            raise BrokenJson("nested too deeply") from None
        except ValueError as error:  # a number of more than 4300 digits
            raise BrokenJson(str(error).split(";")[0]) from None

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            self._unusable.append(Reject("duplicate keys", shortened(repeated(key for key, _ in pairs) or "")))
        return fields

    def _constant(self, name: str) -> None:
        self._unusable.append(Reject("broken JSON", f"{name} is not JSON"))


def repeated(names: Iterable[str]) -> str | None:
    """The first name that occurs more than once."""
    return next((name for name, times in Counter(names).items() if times > 1), None)
