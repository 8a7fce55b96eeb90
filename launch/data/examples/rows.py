"""Rows of token ids and labels."""

from collections.abc import Sequence
from typing import TypedDict

from launch.common.errors import Reject
from launch.common.messages import shortened
from launch.data.examples.kinds import TokenExample
from launch.data.examples.render import Span
from smoothing.core.options import DEFAULT_IGNORE_INDEX

IGNORED = DEFAULT_IGNORE_INDEX  # the label of a token that is context only


class Row(TypedDict):
    """Token ids and labels of equal length, and where they come from.

    `prompt_tokens_cut`: how many tokens were cut from the left. `notes`: for the log. `text`: what was tokenised, and
    `spans`: the characters of it that each token stands for, none for one that was added. A row that came as tokens
    has no text and no spans.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_tokens_cut: int
    notes: list[str]
    text: str
    spans: list[Span]


def labelled(ids: list[int], learned: Sequence[slice], text: str, spans: list[Span]) -> Row:
    """Make a row of which the `learned` tokens are labels; `spans` are the tokens' characters of `text`."""
    labels = [IGNORED] * len(ids)
    for part in learned:
        labels[part] = ids[part]
    return Row(input_ids=ids, labels=labels, prompt_tokens_cut=0, notes=[], text=text, spans=spans)


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
    return Row(input_ids=ids, labels=labels, prompt_tokens_cut=0, notes=[], text="", spans=[])
