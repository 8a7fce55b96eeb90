"""Rows of token ids and labels.

A row is BOS, prompt, completion, EOS, and only completion and EOS carry labels. A prompt that is too long
loses tokens on its left, after BOS; a completion is never cut.
"""

from typing import TypedDict

from launch.common.errors import Reject
from launch.common.messages import error_line, shortened
from launch.data.examples.kinds import TokenExample
from smoothing.core.options import DEFAULT_IGNORE_INDEX

IGNORED = DEFAULT_IGNORE_INDEX  # the label of a token that is context only


class Row(TypedDict):
    """Token ids and labels of equal length, and how many prompt tokens were cut."""

    input_ids: list[int]
    labels: list[int]
    prompt_tokens_cut: int


def token_ids(text: str, tokenizer) -> list[int]:
    """Tokenize `text` without special tokens. Raises Reject if the tokenizer fails."""
    try:
        # verbose=False: no warning about model_max_length, as the length is checked here.
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # the tokenizer came with the model, and may raise anything
        raise Reject("the tokenizer refuses the text", error_line(error, 80)) from None


def join(prompt: list[int], completion: list[int], tokenizer, max_length: int) -> Row:
    """Join prompt and completion, with exactly one BOS and one EOS. Raises Reject for an unusable completion."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompt = strip_left(prompt, bos)
    completion = strip_right(completion if prompt else strip_left(completion, bos), eos)
    if not completion:
        raise Reject("completion has no tokens")
    if eos in completion:
        raise Reject("completion holds the end token before its end")
    answer = [*completion, eos]
    start = [] if bos is None else [bos]
    room = max_length - len(start) - len(answer)
    if room < 0:
        raise Reject(f"completion longer than max_length {max_length}", f"{len(start) + len(answer)} tokens")
    kept = prompt[max(0, len(prompt) - room) :]
    context = start + kept
    return Row(
        input_ids=context + answer,
        labels=[IGNORED] * len(context) + answer,
        prompt_tokens_cut=len(prompt) - len(kept),
    )


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
    return Row(input_ids=ids, labels=labels, prompt_tokens_cut=0)


def strip_left(ids: list[int], token: int | None) -> list[int]:
    """Return `ids` without the run of `token` at their start."""
    start = 0
    while start < len(ids) and ids[start] == token:
        start += 1
    return ids[start:]


def strip_right(ids: list[int], token: int | None) -> list[int]:
    """Return `ids` without the run of `token` at their end."""
    return strip_left(ids[::-1], token)[::-1]
