"""A row in the log: what of it is read and what is learned."""

from collections.abc import Mapping
from typing import Any

from launch.common.messages import counted
from launch.data.examples.rows import IGNORED
from launch.data.preview.decoded import decoded
from launch.data.preview.pieces import Kind, pieces_of, runs
from launch.data.preview.shown import tokens_of


def describe_example(row: Mapping[str, Any], tokenizer) -> str:
    """Describe a row for people: its `where`, its token counts, which text is context and which is learned."""
    ids, labels = list(row["input_ids"]), list(row["labels"])
    learned = sum(label != IGNORED for label in labels[1:])
    lines = [f"{row.get('where', 'row')}: {counted(len(ids), 'token')}, {learned} of them learned"]
    for kind, pieces in runs(pieces_of(tokens_of(ids, tokenizer), labels, *decoded(ids, tokenizer))):
        if kind is not Kind.DROPPED:
            lines.append(f"  {kind:7} | {''.join(piece.shown for piece in pieces)!r}")
    return "\n".join(lines)
