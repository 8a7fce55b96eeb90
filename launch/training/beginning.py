"""How texts begin for the exported tokenizer: with BOS where training began with it."""

from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any

from launch.data.examples.formats import FORMATS

ROWS = 1000  # that are looked at


def begin_as_rows(tokenizer: Any, formats: Collection[str], rows: Iterable[dict[str, Any]]) -> None:
    """Make a tokenizer begin a text with BOS if all rows were tokens already, and began with it.

    Rows of text are tokenised by this tokenizer itself, and those of chats begin as the template has it.
    """
    bos = tokenizer.bos_token_id
    if bos is None or not tokenizer.is_fast or tokenizer("").input_ids[:1] == [bos]:
        return
    if all("input_ids" in FORMATS[name].needs for name in formats) and all(
        row["input_ids"][0] == bos for row in islice(rows, ROWS)
    ):
        tokenizer.add_bos_token = True
