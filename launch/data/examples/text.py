"""Encoding of a prompt and its completion: the tokens of the joined text, of which the completion is learned."""

import re

import numpy

from launch.common.errors import Reject
from launch.data.examples.kinds import TextExample
from launch.data.examples.rows import Row, labelled, with_end
from launch.data.examples.tokens import NOWHERE, Tokens, Untokenised


def begin_text(example: TextExample, tokenizer, special: re.Pattern, max_length: int) -> Untokenised:
    """Begin to encode prompt and completion as a row, which ends with EOS and begins as the tokenizer begins a text.

    A prompt that is too long loses tokens on its left, after BOS; a completion is never cut. `special` finds the
    tokenizer's special tokens. Raises Reject for a completion that cannot be used.
    """
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    prompt, completion = example.prompt, _without_ends(example.completion, eos)
    if eos in completion:
        raise Reject("completion holds the end token before its end")
    text = prompt + completion
    begin = len(text) - len(_without_starts(text, bos)) if bos else 0
    text, start = text[begin:], max(0, len(prompt) - begin)
    return Untokenised(
        text, (start,), True, lambda tokens: _finish(tokens, start, tokenizer.eos_token_id, special, max_length)
    )


def _finish(tokens: Tokens, start: int, eos: int, special: re.Pattern, max_length: int) -> Row:
    text = tokens.text
    learned = tokens.overlapping(start, len(text), special)
    if learned.start >= len(tokens.ids):
        raise Reject("completion has no tokens")
    ids, spans = with_end(tokens.ids, tokens.spans, eos, len(text))
    front = int((tokens.spans[: learned.start, 0] == NOWHERE).sum())
    cut = len(ids) - max_length
    if cut > learned.start - front:
        needed = len(ids) - learned.start + front
        raise Reject(f"completion longer than max_length {max_length}", f"{needed} tokens")
    row = labelled(ids, [slice(learned.start, len(ids))], text, spans)
    if cut > 0:
        kept = numpy.r_[:front, front + cut : len(ids)]
        row["input_ids"], row["labels"], row["spans"] = ids[kept], row["labels"][kept], spans[kept]
        row["prompt_tokens_cut"] = cut
    return row


def _without_starts(text: str, bos: str) -> str:
    while text.startswith(bos):
        text = text[len(bos) :]
    return text


def _without_ends(text: str, eos: str) -> str:
    while text.endswith(eos):
        text = text[: -len(eos)]
    return text
