"""Rows as they are shown: each with its pieces, from the text that its tokens were made of."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.common.errors import Reject
from launch.common.messages import one_line
from launch.data.encode_batch import BatchEncoder
from launch.data.examples.render import LARGEST_TEXT
from launch.data.examples.rows import IGNORED, Row
from launch.data.preview.cut import cut_between
from launch.data.preview.decoded import decoded
from launch.data.preview.pieces import Cut, Kind, Piece, Token, learned_texts, pieces_of
from launch.data.records import DataError, Record, Rejected

UNLIMITED = LARGEST_TEXT  # tokens: no text has more of them than characters, but for a few bytes each
MOST_DROPPED_CHARACTERS = 2000  # shown of one dropped text
CHANGED = "the text of this row is decoded from its tokens: its record has changed since it was prepared"


@dataclass(frozen=True)
class ShownRow:
    """A row to show.

    Attributes:
        where: Its `file:line`.
        pieces: Its text.
        input_ids: Its tokens; none if it was dropped.
        labels: Their labels.
        reason: Why it was dropped.
        notes: What else there is to say of it.
    """

    where: str
    pieces: list[Piece]
    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    reason: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def label_tokens(self) -> int:
        """How many tokens are learned; nothing precedes the first, so it is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def learned(self) -> list[str]:
        return learned_texts(self.pieces)


class Shower:
    """Makes rows to show of prepared rows and of what was dropped.

    Args:
        encoder: As the rows were encoded.
        records: The records that rows come from, by their `where` on one line.
    """

    def __init__(self, encoder: BatchEncoder, records: Mapping[str, Record]):
        self.encoder, self.records = encoder, records
        self.encode, self.tokenizer = encoder.encode, encoder.encode.tokenizer
        self.unlimited = encoder.encode.with_length(UNLIMITED)

    def kept(self, prepared: Mapping[str, Any]) -> ShownRow:
        """Show a prepared row."""
        where, ids, labels = prepared["where"], list(prepared["input_ids"]), list(prepared["labels"])
        tokens = tokens_of(ids, self.tokenizer)
        row, notes, cut = self._again(where), [], None
        if row is not None and (row["input_ids"].tolist(), row["labels"].tolist()) == (ids, labels):
            notes = list(row["notes"])
            cut = self._cut(where, row)
        elif where in self.records:
            row, notes = None, [CHANGED]
        if row is not None and len(row["spans"]) and self.tokenizer.is_fast:
            pieces = pieces_of(tokens, labels, row["text"], row["spans"].tolist(), cut)
        else:
            pieces = pieces_of(tokens, labels, *decoded(ids, self.tokenizer))
        if row is not None and row["prompt_tokens_cut"]:
            notes.append(f"{row['prompt_tokens_cut']:,} tokens dropped to fit --max_length {self.encode.max_length}")
        return ShownRow(where, pieces, ids, labels, notes=notes)

    def dropped(self, rejected: Rejected) -> ShownRow:
        """Show what was dropped: its text if it can be rendered, else its record."""
        reason = rejected.reason + (f" ({rejected.detail})" if rejected.detail else "")
        text = ""
        if (record := self.records.get(one_line(rejected.where))) is not None:
            try:
                text = self.unlimited(self.encoder.example_of(record))["text"]
            except (Reject, DataError):
                text = ""
            text = text or record_text(record)
        pieces = [Piece(Kind.DROPPED, shortened_middle(text))] if text else []
        return ShownRow(one_line(rejected.where), pieces, reason=reason)

    def _again(self, where: str) -> Row | None:
        """Encode a row once more, for its text."""
        if where not in self.records:
            return None
        try:
            return self.encode(self.encoder.example_of(self.records[where]))
        except (Reject, DataError):
            return None

    def _cut(self, where: str, row: Row) -> Cut | None:
        """Return the turns that a conversation has lost; what a text has lost is still in its text."""
        if not row["prompt_tokens_cut"]:
            return None
        try:
            whole = self.unlimited(self.encoder.example_of(self.records[where]))["text"]
        except (Reject, DataError):
            return None
        cut = cut_between(whole, row["text"], self.encode.template.special)
        return cut and Cut(cut.place, shortened_middle(cut.text))


def tokens_of(ids: Sequence[int], tokenizer) -> list[Token]:
    """Return tokens with their names."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special |= set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return [
        Token(position, token, str(token if name is None else name), token in special)
        for position, (token, name) in enumerate(zip(ids, names, strict=True))
    ]


def record_text(record: Record) -> str:
    """Return a record as JSON, for one that no text can be made of."""
    try:
        return json.dumps(dict(record.fields), ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError, Reject):  # nested too deeply, or a field that cannot be read
        return ""


def shortened_middle(text: str, limit: int = MOST_DROPPED_CHARACTERS) -> str:
    """Return a text without its middle if it is long."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]} … {len(text) - 2 * half:,} more characters … {text[-half:]}"
