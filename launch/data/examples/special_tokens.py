"""Special tokens that a row's text spells out. A tokenizer reads them as those tokens, which rendered chats need."""

import re

from launch.data.examples.formats import ChatExample, Example, TextExample


class SpelledOut:
    """Finds them: `</s>` in a question may be intended, or may end the question by accident."""

    def __init__(self, tokenizer):
        tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._any = re.compile("|".join(map(re.escape, sorted(filter(None, tokens), reverse=True))) or r"(?!)")
        self._start, self._end = tokenizer.bos_token or "", tokenizer.eos_token or ""

    def first(self, example: Example) -> str | None:
        """The first in an example's text (of messages, their content), but for a start and an end at their places."""
        if isinstance(example, TextExample):
            texts = [example.prompt.removeprefix(self._start), example.completion.removesuffix(self._end)]
        elif isinstance(example, ChatExample):
            texts = [message["content"] for message in example.messages]
        else:
            texts = []
        return next((found[0] for text in texts if (found := self._any.search(text))), None)
