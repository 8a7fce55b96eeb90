"""Special tokens spelled out in a row's text. The tokenizer reads them as special tokens, as rendered chats need."""

import re

from launch.data.examples.kinds import ChatExample, Example, PairExample, TextExample


def special_pattern(tokenizer) -> re.Pattern:
    """Return a pattern that finds a tokenizer's special tokens in text."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(filter(None, tokens), reverse=True))) or r"(?!)")


class SpelledOut:
    """Finds special tokens in text: `</s>` in a question may be intended, or may end the question by accident."""

    def __init__(self, tokenizer):
        self._any = special_pattern(tokenizer)
        self._start, self._end = tokenizer.bos_token or "", tokenizer.eos_token or ""

    def first(self, example: Example) -> str | None:
        """Return the first special token in an example's text, other than BOS at its start and EOS at its end."""
        if isinstance(example, PairExample):
            example = example.text
        if isinstance(example, TextExample):
            texts = [example.prompt.removeprefix(self._start), example.completion.removesuffix(self._end)]
        elif isinstance(example, ChatExample):
            texts = [message.get("content") or "" for message in example.messages]
        else:
            texts = []
        return next((found[0] for text in texts if (found := self._any.search(text))), None)
