"""A row's text in pieces: what is learned, what is read only, and what no token of the row stands for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby

from launch.data.examples.render import Span
from launch.data.examples.rows import IGNORED


class Kind(StrEnum):
    """What becomes of a text: the model learns to write it, reads it, or never sees it."""

    LEARNED = "learned"
    READ = "read"
    DROPPED = "dropped"


@dataclass(frozen=True)
class Token:
    """A token of a row: its position, its id, and its name in the vocabulary."""

    position: int
    id: int
    name: str
    special: bool = False


@dataclass(frozen=True)
class Piece:
    """Characters that belong together: those of one token, or of a few that share a character.

    Attributes:
        kind: What becomes of them.
        text: The characters; none for a token that stands for none, such as an EOS that was added.
        tokens: Whose they are; none if the text is dropped.
    """

    kind: Kind
    text: str
    tokens: tuple[Token, ...] = ()

    @property
    def special(self) -> bool:
        return any(token.special for token in self.tokens)

    @property
    def shown(self) -> str:
        """The text, or the name of a special token without one."""
        return self.text or "".join(token.name for token in self.tokens if token.special)


@dataclass(frozen=True)
class Cut:
    """Text that was taken out of a row's text, and where it stood."""

    place: int
    text: str


def pieces_of(
    tokens: Sequence[Token], labels: Sequence[int], text: str, spans: Sequence[Span], cut: Cut | None = None
) -> list[Piece]:
    """Return a row's pieces in the order of its text.

    Args:
        tokens: The row's tokens.
        labels: Their labels.
        text: What was tokenised.
        spans: The characters of each token.
        cut: What was dropped before the text was tokenised.
    """
    pieces: list[Piece] = []
    reached = 0

    def drop(end: int) -> None:
        nonlocal reached, cut
        if cut is not None and cut.place <= end:
            _add_dropped(pieces, text[reached : cut.place])
            _add_dropped(pieces, cut.text)
            reached, cut = max(reached, cut.place), None
        _add_dropped(pieces, text[reached:end])
        reached = max(reached, end)

    for first, last, (start, end) in _sharing(spans):
        drop(start)
        learned = any(label != IGNORED for label in labels[first:last])
        kind = Kind.LEARNED if learned else Kind.READ
        pieces.append(Piece(kind, text[max(start, reached) : end], tuple(tokens[first:last])))
        reached = max(reached, end)
    drop(len(text))
    return pieces


def runs(pieces: Iterable[Piece]) -> list[tuple[Kind, list[Piece]]]:
    """Return neighbours of one kind together."""
    return [(kind, list(group)) for kind, group in groupby(pieces, key=lambda piece: piece.kind)]


def learned_texts(pieces: Sequence[Piece]) -> list[str]:
    """Return the text of each run of learned tokens, with blanks in it that have no token of their own."""
    texts: list[str] = []
    waiting, open_ = "", False
    for piece in pieces:
        if piece.kind is Kind.LEARNED and open_:
            texts[-1] += waiting + piece.shown
        elif piece.kind is Kind.LEARNED:
            texts.append(piece.shown)
        waiting = waiting + piece.text if piece.kind is Kind.DROPPED else ""
        open_ = piece.kind is Kind.LEARNED or (open_ and piece.kind is Kind.DROPPED)
    return texts


def _add_dropped(pieces: list[Piece], text: str) -> None:
    if text:
        pieces.append(Piece(Kind.DROPPED, text))


def _sharing(spans: Sequence[Span]) -> Iterable[tuple[int, int, Span]]:
    """Yield neighbours whose characters overlap as one: the first, the one behind the last, and their characters."""
    first = 0
    while first < len(spans):
        start, end = spans[first]
        last = first + 1
        while last < len(spans) and start < end and spans[last][0] < end and spans[last][0] < spans[last][1]:
            end = max(end, spans[last][1])
            last += 1
        yield first, last, (start, end)
        first = last
