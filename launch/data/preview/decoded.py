"""The text that token ids stand for, where nothing else is known of it: each token decoded after those before it."""

from collections.abc import Sequence

from launch.data.examples.render import Span

INCOMPLETE = "\ufffd"  # what the first bytes of a character are decoded as
BYTES_A_CHARACTER = 4


def decoded(ids: Sequence[int], tokenizer) -> tuple[str, list[Span]]:
    """Return the text of tokens, and the characters of it that each stands for.

    A token is decoded together with its predecessor, so that a blank at its beginning is there. Tokens that make one
    character together have that character each.
    """
    ids = list(ids)
    text, spans = "", []
    before, begin = 0, 0
    for end in range(1, len(ids) + 1):
        known, shown = _decode(ids[before:begin], tokenizer), _decode(ids[before:end], tokenizer)
        added = shown.removeprefix(known)
        if added.endswith(INCOMPLETE) and end < len(ids) and end - begin < BYTES_A_CHARACTER:
            continue
        spans += [(len(text), len(text) + len(added))] * (end - begin)
        text += added
        before, begin = begin, end
    return text, spans


def _decode(ids: list[int], tokenizer) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
