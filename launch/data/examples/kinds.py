"""The kinds of example: what every format of records comes down to, and what is encoded as a row."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TextExample:
    """A prompt, which may be empty, and the completion to be learned."""

    prompt: str
    completion: str
    where: str


@dataclass(frozen=True)
class ChatExample:
    """A conversation for the tokenizer's chat template.

    `learned`: the indices of the assistant's messages that are to be learned, ascending, at least one.
    `template_kwargs`: what else the template is given: `tools`, `documents`, and the row's `chat_template_kwargs`.
    """

    messages: list[dict[str, Any]]
    where: str
    learned: tuple[int, ...]
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PairExample:
    """A question and its answer: a conversation for a tokenizer with a chat template, a text for any other."""

    text: TextExample
    chat: ChatExample

    @property
    def where(self) -> str:
        return self.text.where


@dataclass(frozen=True)
class TokenExample:
    """Token ids and labels that are used as they are."""

    input_ids: list[int]
    labels: list[int]
    where: str


Example = TextExample | ChatExample | PairExample | TokenExample
