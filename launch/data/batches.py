"""Padding of rows of unequal length into one batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from launch.data.blank_rows import BLANK
from launch.data.examples.rows import IGNORED


@dataclass(frozen=True)
class PadToLongest:
    """Pads on the right to the longest row, rounded up to a multiple; columns [rows, length], int64, and `where`.

    Counted here to avoid a synchronisation with the device: `label_tokens`, the positions whose next token has a
    label, and `tokens`, all but padding and blank rows. Raises ValueError for no rows, or a row whose labels are not
    as long as its input_ids.
    """

    pad_token_id: int
    multiple_of: int = 8

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor | int | list[str]]:
        if not rows:
            raise ValueError("expected at least one row, got none")
        lengths = [len(row["input_ids"]) for row in rows]
        longest = -(-max(lengths) // self.multiple_of) * self.multiple_of
        input_ids = torch.full((len(rows), longest), self.pad_token_id, dtype=torch.int64)
        labels = torch.full((len(rows), longest), IGNORED, dtype=torch.int64)
        attention_mask = torch.zeros((len(rows), longest), dtype=torch.int64)
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if len(row["labels"]) != length:
                raise ValueError(f"expected {length} labels, as many as input_ids, got {len(row['labels'])}")
            input_ids[index, :length] = torch.as_tensor(row["input_ids"], dtype=torch.int64)
            labels[index, :length] = torch.as_tensor(row["labels"], dtype=torch.int64)
            attention_mask[index, :length] = 1
        where = [row.get("where", "") for row in rows]
        tokens = sum(length for length, name in zip(lengths, where, strict=True) if name != BLANK)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": attention_mask,
            "label_tokens": int((labels[:, 1:] != IGNORED).sum()),
            "tokens": tokens,
            "where": where,
        }
