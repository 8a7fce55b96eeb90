"""Tokens of a text, and which of them overlap the characters to learn.

The text is tokenised once, whole: what stands in a row is what the tokenizer makes of the text, with no seams.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from launch.common.errors import Reject
from launch.common.messages import error_line, typed_error_line
from launch.data.examples.render import LARGEST_TEXT, Span
from launch.data.examples.rows import Row
from launch.data.examples.token_bytes import TokenBytes

NOWHERE = -1  # where a token begins and ends that stands for no text, such as BOS


@dataclass
class Tokens:
    """The tokens of a text: int32 [tokens], and the characters that each stands for, int32 [tokens, 2], in order."""

    ids: numpy.ndarray
    spans: numpy.ndarray
    text: str

    def overlapping(self, start: int, end: int, special: re.Pattern) -> slice:
        """Return which tokens overlap the characters from `start` to `end`.

        A token without characters of its own (blanks that were trimmed) has those between its neighbours. A special
        token that takes blanks of its neighbour along is no token of the neighbour.
        """
        starts, ends, count = self.spans[:, 0], self.spans[:, 1], len(self.ids)
        first = int(ends.searchsorted(start, "right"))
        if first < count and 0 <= starts[first] < start and special.match(self.text, starts[first]):
            first += 1
        last = max(first, int(starts.searchsorted(end)))
        if last > first and ends[last - 1] > end:
            begin, stop = self.spans[last - 1].tolist()
            content = stop - len(self.text[begin:stop].lstrip())
            last -= content >= end and special.match(self.text, content) is not None
        following = starts[first] if first < count else end
        while first and following > start and starts[first - 1] == ends[first - 1] >= start:
            first -= 1
        while first < last < count and starts[last] == ends[last]:
            last += 1
        return slice(first, last)


@dataclass(frozen=True)
class Untokenised:
    """A row as far as it is made without tokens.

    Attributes:
        text: All of its text.
        boundaries: Characters at which spans begin or end, ascending: a tokenizer without offsets is asked for the
            tokens up to each.
        special_tokens: Put those in front that the tokenizer puts there by habit (BOS); at the end, none.
        finish: Makes the row of its tokens. Raises Reject for a row that cannot be trained on.
    """

    text: str
    boundaries: Sequence[int]
    special_tokens: bool
    finish: Callable[[Tokens], Row]


class Tokeniser:
    """Tokenises texts, and finds the characters of each token.

    Args:
        tokenizer: A fast one tells its tokens' characters.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        kind = type(tokenizer)
        # what transformers does around the backend for one text, unless a subclass does more
        self._direct = tokenizer.is_fast and (kind.__call__, kind._encode_plus) == (
            PreTrainedTokenizerBase.__call__,
            PreTrainedTokenizerFast._encode_plus,
        )
        self._bytes = TokenBytes.of(tokenizer) if self._direct else None

    def __call__(self, text: str, boundaries: Sequence[int] = (), special_tokens: bool = False) -> Tokens:
        """Tokenise a text; see `Untokenised`. Raises Reject for one that the tokenizer refuses."""
        if len(text) > LARGEST_TEXT:
            raise Reject(f"longer than {LARGEST_TEXT:,} characters", f"{len(text):,}")
        try:
            if not self.tokenizer.is_fast:
                return self._without_offsets(text, boundaries, special_tokens)
            return self._by_bytes([text], special_tokens)[0] or self._by_offsets(text, special_tokens)
        except Reject:
            raise
        except Exception as error:  # the tokenizer came with the model, and may raise anything
            raise Reject("the tokenizer refuses the text", error_line(error, 80)) from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # what Rust's panics become is no Exception
                raise
            raise Reject("the tokenizer fails on the text", typed_error_line(error, 80)) from None

    def together(self, rows: Sequence[Untokenised]) -> list[Tokens | None]:
        """Tokenise the texts of several rows at once; None for each that is to be tokenised alone.

        The tokens are the same, in less time: what renders texts and what tokenises them would take turns in the
        processor's caches.
        """
        if self._bytes is None or any(len(row.text) > LARGEST_TEXT for row in rows):
            return [None] * len(rows)
        found: list[Tokens | None] = [None] * len(rows)
        for special_tokens in {row.special_tokens for row in rows}:
            places = [place for place, row in enumerate(rows) if row.special_tokens == special_tokens]
            try:
                tokens = self._by_bytes([rows[place].text for place in places], special_tokens)
            except Exception:  # one of the texts is refused; alone, it says which, and why
                continue
            except BaseException as error:
                if type(error).__name__ != "PanicException":
                    raise
                continue
            for place, its in zip(places, tokens, strict=True):
                found[place] = its
        return found

    def _by_bytes(self, texts: Sequence[str], special_tokens: bool) -> list[Tokens | None]:
        """Return the tokens of texts, None where the bytes of the tokenizer's tokens are not those of a text."""
        if self._bytes is None:
            return [None] * len(texts)
        self._settle()
        encode = self.tokenizer.backend_tokenizer.encode_batch_fast
        made = encode(texts, add_special_tokens=special_tokens)
        return [self._placed(each, text, special_tokens) for each, text in zip(made, texts, strict=True)]

    def _placed(self, encoded, text: str, special_tokens: bool) -> Tokens | None:
        ids, front = numpy.array(encoded.ids, numpy.int32), 0
        if special_tokens:
            ids, front = _without_end(ids, encoded.special_tokens_mask)
        spans = self._bytes.spans(ids[front:], text) if self._bytes else None
        return None if spans is None else _tokens(ids, front, spans, text)

    def _by_offsets(self, text: str, special_tokens: bool) -> Tokens:
        if self._direct:
            self._settle()
            encoded = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=special_tokens)
            ids, offsets, mask = encoded.ids, encoded.offsets, encoded.special_tokens_mask
        else:
            options = ("return_offsets_mapping", "return_special_tokens_mask")
            found = self._ids(text, special_tokens, **dict.fromkeys(options, True))
            ids, offsets, mask = found["input_ids"], found["offset_mapping"], found["special_tokens_mask"]
        ids, spans, front = numpy.array(ids, numpy.int32), _spans(offsets), 0
        if special_tokens:
            ids, front = _without_end(ids, numpy.array(mask, bool) & (spans[:, 0] == spans[:, 1]))
        return _tokens(ids, front, _in_order(spans[front : len(ids)]), text)

    def _without_offsets(self, text: str, boundaries: Sequence[int], special_tokens: bool) -> Tokens:
        """Place tokens between boundaries by the tokens of the text up to each. Raises Reject where these differ."""
        whole = self._ids(text)["input_ids"]
        places, reached, cut = [], 0, 0
        for boundary in [*boundaries, len(text)]:
            count = len(whole) if boundary == len(text) else 0
            if not count:
                part = self._ids(text[:boundary])["input_ids"]
                alike = (index for index, (one, other) in enumerate(zip(part, whole, strict=False)) if one != other)
                count = next(alike, min(len(part), len(whole)))
                if len(part) - count > 1:  # more than the one token that may straddle the boundary
                    raise Reject("the tokenizer gives no offsets, and splits the text otherwise without its end")
            count = max(count, reached)
            places += [(cut, boundary)] * (count - reached)
            reached, cut = count, boundary
        start: list[int] = []
        if special_tokens:
            habit, bos = self._ids("", True)["input_ids"], self.tokenizer.bos_token_id
            start = habit[:1] if bos is not None and habit[:1] == [bos] else []
        return _tokens(numpy.array(start + whole, numpy.int32), len(start), _spans(places), text)

    def _ids(self, text: str, special_tokens: bool = False, **options):
        # verbose=False: no warning about model_max_length, as the length is checked elsewhere
        return self.tokenizer(text, add_special_tokens=special_tokens, verbose=False, **options)

    def _settle(self) -> None:
        """Undo what an earlier call of the tokenizer has left behind, as transformers does at each."""
        backend = self.tokenizer.backend_tokenizer
        special_as_text = backend.encode_special_tokens != self.tokenizer.split_special_tokens
        if special_as_text or backend.truncation is not None or backend.padding is not None:
            self._ids("")


def _without_end(ids: numpy.ndarray, added: Sequence[int] | numpy.ndarray) -> tuple[numpy.ndarray, int]:
    """Return the ids without those that were added at the end, and how many were added in front."""
    back, front = len(ids), 0
    while back and added[back - 1]:
        back -= 1
    while front < back and added[front]:
        front += 1
    return ids[:back], front


def _tokens(ids: numpy.ndarray, front: int, spans: numpy.ndarray, text: str) -> Tokens:
    """Return tokens of which the first `front` stand for no text, and the others for `spans`."""
    if front:
        spans = numpy.concatenate([numpy.full((front, 2), NOWHERE, numpy.int32), spans])
    return Tokens(ids, spans, text)


def _spans(places: Sequence[Span]) -> numpy.ndarray:
    return numpy.array(places, numpy.int32).reshape(-1, 2)


def _in_order(spans: numpy.ndarray) -> numpy.ndarray:
    """Return spans as they are, unless some go back: then each begins and ends where the last one did, or later."""
    later = numpy.diff(spans, axis=0)
    if ((later[:, 0] > 0) | ((later[:, 0] == 0) & (later[:, 1] >= 0))).all():
        return spans
    return numpy.maximum.accumulate(spans, axis=0)
