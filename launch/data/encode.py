"""Encoding of examples as rows of token ids and labels."""

from collections.abc import Mapping, Sequence
from copy import copy
from datetime import date
from typing import Any

import numpy

from launch.common.errors import Reject
from launch.data.examples.conversation import begin_chat
from launch.data.examples.kinds import ChatExample, Example, PairExample, TokenExample
from launch.data.examples.render import ChatTemplate, row_time_limit
from launch.data.examples.rows import Row, checked_tokens
from launch.data.examples.text import begin_text
from launch.data.examples.tokens import Tokeniser, Tokens, Untokenised
from launch.data.records import DataError


class Encoder:
    """Encodes examples as rows with one tokenizer.

    Args:
        tokenizer: With its chat template, if it has one.
        max_length: Longest row in tokens.
        arguments: Variables for the chat template.
        day: The date that the chat template is told, today's if None.
        pairs_as_chat: Write questions and answers with the chat template, where there is one.
    """

    def __init__(
        self,
        tokenizer,
        max_length: int,
        arguments: Mapping[str, Any] | None = None,
        day: date | None = None,
        pairs_as_chat: bool = True,
    ):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.tokenise = Tokeniser(tokenizer)
        self.template = ChatTemplate(tokenizer, arguments, day)
        self.pairs_as_chat = pairs_as_chat and bool(tokenizer.chat_template)

    def __call__(self, example: Example) -> Row:
        """Encode one example.

        Raises Reject for a row that cannot be trained on, DataError for a tokenizer that cannot encode it.
        """
        begun = self.begin(example)
        return self.finish(begun) if isinstance(begun, Untokenised) else begun

    def begin(self, example: Example) -> Row | Untokenised:
        """Encode an example up to where its text is tokenised. Raises as a call does."""
        if isinstance(example, TokenExample):
            return checked_tokens(example, len(self.tokenizer), self.max_length)
        check_tokenizer(self.tokenizer, self.max_length)
        with row_time_limit():
            if isinstance(example, PairExample):
                example = example.chat if self.pairs_as_chat else example.text
            if isinstance(example, ChatExample):
                return begin_chat(example, self.template, self.tokenise, self.max_length)
            return begin_text(example, self.tokenizer, self.template.special, self.max_length)

    def together(self, begun: Sequence[Untokenised]) -> list[Tokens | None]:
        """Tokenise rows at once, which takes less time than one by one; None for each to be tokenised alone."""
        try:
            with row_time_limit():
                return self.tokenise.together(begun)
        except (Reject, MemoryError):
            return [None] * len(begun)

    def finish(self, begun: Untokenised, tokens: Tokens | None = None) -> Row:
        """Make the row of its tokens, which are made here if they are not there yet. Raises Reject."""
        with row_time_limit():
            if tokens is None:
                tokens = self.tokenise(begun.text, begun.boundaries, begun.special_tokens)
            return begun.finish(tokens)

    def with_length(self, max_length: int) -> "Encoder":
        """Return the same encoder for rows of another length."""
        other = copy(self)
        other.max_length = max_length
        return other


def encode(example: Example, tokenizer, max_length: int) -> dict[str, Any]:
    """Encode one example with a tokenizer as it is, as lists; see `Encoder`."""
    row = Encoder(tokenizer, max_length)(example)
    return {name: value.tolist() if isinstance(value, numpy.ndarray) else value for name, value in row.items()}


def check_tokenizer(tokenizer, max_length: int) -> None:
    """Raise DataError for a tokenizer without an EOS token, or a length without room for a label."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            "Expected a tokenizer with an EOS token, which the model learns to stop with; set tokenizer.eos_token."
        )
    if max_length < 3:
        raise DataError(f"Expected max_length of at least 3 (BOS, a token, EOS), got {max_length}; raise it.")
