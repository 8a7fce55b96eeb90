"""Rows of token ids and labels."""

from collections.abc import Sequence
from typing import TypedDict

import numpy

from launch.common.errors import Reject
from launch.common.messages import shortened
from launch.data.examples.kinds import TokenExample
from smoothing.core.options import DEFAULT_IGNORE_INDEX

IGNORED = DEFAULT_IGNORE_INDEX  # the label of a token that is context only
NO_SPANS = numpy.zeros((0, 2), numpy.int32)


class Row(TypedDict):
    """Token ids and labels, int32 of equal length, and where they come from.

    `prompt_tokens_cut`: how many tokens were cut from the left. `notes`: for the log. `text`: what was tokenised, and
    `spans`: the characters of it that each token stands for, int32 [tokens, 2], none for one that was added. A row
    that came as tokens has no text and no spans.
    """

    input_ids: numpy.ndarray
    labels: numpy.ndarray
    prompt_tokens_cut: int
    notes: list[str]
    text: str
    spans: numpy.ndarray


def labelled(ids: numpy.ndarray, learned: Sequence[slice], text: str, spans: numpy.ndarray) -> Row:
    """Make a row of which the `learned` tokens are labels; `spans` are the tokens' characters of `text`."""
    labels = numpy.full(len(ids), IGNORED, numpy.int32)
    for part in learned:
        labels[part] = ids[part]
    return Row(input_ids=ids, labels=labels, prompt_tokens_cut=0, notes=[], text=text, spans=spans)


def with_end(ids: numpy.ndarray, spans: numpy.ndarray, token: int, end: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return ids and spans with a token more that is added behind the first `end` characters of the text."""
    added = (numpy.array([token], numpy.int32), numpy.array([[end, end]], numpy.int32))
    return numpy.concatenate([ids, added[0]]), numpy.concatenate([spans, added[1]])


def checked_tokens(example: TokenExample, vocab_size: int, max_length: int) -> Row:
    """Make a row of token ids and labels that came with the data. Raises Reject if they are unusable."""
    ids, labels = example.input_ids, example.labels
    if len(ids) != len(labels):
        raise Reject("input_ids and labels differ in length", f"{len(ids)} and {len(labels)}")
    if len(ids) > max_length:
        raise Reject(f"row longer than max_length {max_length}", f"{len(ids)} tokens")
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise Reject(f"input_ids outside [0, {vocab_size})", shortened(str(outside[0])))
    # Models shift labels themselves, so a label can only repeat the input id at its own position.
    if any(label not in (IGNORED, token) for token, label in zip(ids, labels, strict=True)):
        raise Reject(f"labels are neither {IGNORED} nor the input id at their position (shifted already?)")
    # Nothing precedes position 0, so a label there is never predicted.
    if all(label == IGNORED for label in labels[1:]):
        raise Reject("no label tokens")
    row = labelled(numpy.array(ids, numpy.int32), [], "", NO_SPANS)
    row["labels"] = numpy.array(labels, numpy.int32)
    return row
