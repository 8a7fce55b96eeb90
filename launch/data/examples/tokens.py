"""Tokens of a text, and which of them overlap the characters to learn.

The text is tokenised once, whole: what stands in a row is what the tokenizer makes of the text, with no seams.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from launch.common.errors import Reject
from launch.common.messages import error_line, typed_error_line
from launch.data.examples.render import LARGEST_TEXT, Span

NOWHERE = (-1, -1)  # the place of a token that stands for no text, such as BOS


@dataclass
class Tokens:
    """The tokens of a text: their ids, and the characters that each stands for, in order."""

    ids: list[int]
    spans: list[Span]
    text: str

    def overlapping(self, start: int, end: int, special: re.Pattern) -> slice:
        """Return which tokens overlap the characters from `start` to `end`.

        A token without characters of its own (blanks that were trimmed) has those between its neighbours. A special
        token that takes blanks of its neighbour along is no token of the neighbour.
        """
        spans = self.spans
        first = bisect_right(spans, start, key=lambda span: span[1])
        if first < len(spans) and 0 <= spans[first][0] < start and special.match(self.text, spans[first][0]):
            first += 1
        last = max(first, bisect_left(spans, end, key=lambda span: span[0]))
        if last > first and spans[last - 1][1] > end:
            begin, stop = spans[last - 1]
            content = stop - len(self.text[begin:stop].lstrip())
            last -= content >= end and special.match(self.text, content) is not None
        following = spans[first][0] if first < len(spans) else end
        while first and following > start and spans[first - 1][0] == spans[first - 1][1] >= start:
            first -= 1
        while first < last < len(spans) and spans[last][0] == spans[last][1]:
            last += 1
        return slice(first, last)


def tokenise(text: str, tokenizer, boundaries: Sequence[int] = (), special_tokens: bool = False) -> Tokens:
    """Tokenise a text.

    Args:
        text: All of a row's text.
        tokenizer: A fast one tells its tokens' characters.
        boundaries: Characters at which spans begin or end, ascending: a tokenizer without offsets is asked for the
            tokens up to each.
        special_tokens: Put those in front that the tokenizer puts there by habit (BOS); at the end, none.

    Raises:
        Reject: The tokenizer refuses the text.
    """
    if len(text) > LARGEST_TEXT:
        raise Reject(f"longer than {LARGEST_TEXT:,} characters", f"{len(text):,}")
    if not tokenizer.is_fast:
        return _without_offsets(text, tokenizer, boundaries, special_tokens)
    # verbose=False: no warning about model_max_length, as the length is checked elsewhere.
    encoded = _call(
        tokenizer,
        text,
        add_special_tokens=special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    front = 0
    if special_tokens:
        added = [
            bool(mark) and start == end
            for mark, (start, end) in zip(encoded["special_tokens_mask"], offsets, strict=True)
        ]
        back = len(ids)
        while back and added[back - 1]:
            back -= 1
        while front < back and added[front]:
            front += 1
        ids, offsets = ids[:back], offsets[:back]
    return Tokens(ids, [NOWHERE] * front + _in_order(offsets[front:]), text)


def _in_order(offsets: list[Span]) -> list[Span]:
    """Return the offsets as they are, unless some go back: then each begins where the last one did, or later."""
    if offsets == sorted(offsets):
        return offsets
    spans, reached = [], (0, 0)
    for start, end in offsets:
        reached = (max(reached[0], start), max(reached[1], end))
        spans.append(reached)
    return spans


def _without_offsets(text: str, tokenizer, boundaries: Sequence[int], special_tokens: bool) -> Tokens:
    """Place tokens between boundaries by the tokens of the text up to each. Raises Reject where these differ."""
    whole = _call(tokenizer, text, add_special_tokens=False)["input_ids"]
    places, reached, cut = [], 0, 0
    for boundary in [*boundaries, len(text)]:
        count = len(whole) if boundary == len(text) else 0
        if not count:
            part = _call(tokenizer, text[:boundary], add_special_tokens=False)["input_ids"]
            alike = (index for index, (one, other) in enumerate(zip(part, whole, strict=False)) if one != other)
            count = next(alike, min(len(part), len(whole)))
            if len(part) - count > 1:  # more than the one token that may straddle the boundary
                raise Reject("the tokenizer gives no offsets, and splits the text otherwise without its end")
        count = max(count, reached)
        places += [(cut, boundary)] * (count - reached)
        reached, cut = count, boundary
    start: list[int] = []
    if special_tokens:
        habit = _call(tokenizer, "", add_special_tokens=True)["input_ids"]
        start = habit[:1] if tokenizer.bos_token_id is not None and habit[:1] == [tokenizer.bos_token_id] else []
    return Tokens(start + whole, [NOWHERE] * len(start) + places, text)


def _call(tokenizer, text: str, **options):
    try:
        return tokenizer(text, verbose=False, **options)
    except Exception as error:  # the tokenizer came with the model, and may raise anything
        raise Reject("the tokenizer refuses the text", error_line(error, 80)) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what Rust's panics become is no Exception
            raise
        raise Reject("the tokenizer fails on the text", typed_error_line(error, 80)) from None
