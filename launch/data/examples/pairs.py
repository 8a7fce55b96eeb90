"""Rows of a question and its answer, with what may stand before them: a system prompt, earlier pairs, a context."""

from dataclasses import dataclass
from typing import Any

from launch.common.errors import Reject
from launch.data.examples.kinds import ChatExample, PairExample, TextExample
from launch.data.examples.template_kwargs import template_kwargs
from launch.data.examples.values import Fields, holds, nested, optional_text, text, text_with_words, unicode

SYSTEM = ("system", "system_prompt")


@dataclass(frozen=True)
class Wording:
    """How a pair is written where there is no chat template. The answer follows after a space, which is its own.

    A model continues "Answer:" with " 4", not with "4".
    """

    prompt: str
    with_context: str


QUESTION = Wording("Question: {question}\nAnswer:", "Context: {context}\nQuestion: {question}\nAnswer:")
INSTRUCTION = Wording("Instruction: {question}\nResponse:", "Instruction: {question}\nInput: {context}\nResponse:")


def question_answer(fields: Fields, where: str) -> PairExample | ChatExample:
    """A question, perhaps about a context that stands before it, and its answer."""
    question, context = text(fields, "question"), optional_text(fields, "context")
    asked = "\n\n".join(filter(str.strip, (context, question)))
    return _pair(fields, where, QUESTION, (question, context, asked), text_with_words(fields, "answer"))


def instruction_output(fields: Fields, where: str) -> PairExample | ChatExample:
    """An instruction, perhaps with an input, and its output: the names of Alpaca."""
    return _instruction(fields, where, "output")


def instruction_response(fields: Fields, where: str) -> PairExample | ChatExample:
    """An instruction, perhaps with a context, and its response: the names of Dolly."""
    return _instruction(fields, where, "response")


def _instruction(fields: Fields, where: str, answer: str) -> PairExample | ChatExample:
    instruction, context = text(fields, "instruction"), optional_text(fields, "input", "context")
    asked = "\n\n".join(filter(str.strip, (instruction, context)))
    return _pair(fields, where, INSTRUCTION, (instruction, context, asked), text_with_words(fields, answer))


def _pair(
    fields: Fields, where: str, wording: Wording, question: tuple[str, str, str], answer: str
) -> PairExample | ChatExample:
    """A pair as text and as a conversation.

    Args:
        question: alone, its context, and the two as one message.
    """
    alone, context, asked = question
    system, history, kwargs = optional_text(fields, *SYSTEM), _history(fields), template_kwargs(fields)
    chat: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    before = f"{system}\n\n" if system else ""
    for earlier, reply in history:
        chat += [{"role": "user", "content": earlier}, {"role": "assistant", "content": reply}]
        before += f"{wording.prompt.format(question=earlier)} {reply}\n\n"
    chat += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    conversation = ChatExample(chat, where, (len(chat) - 1,), kwargs)
    if kwargs.keys() & {"tools", "documents"}:
        return conversation  # as text they would be lost
    written = wording.with_context if context else wording.prompt
    prompt = before + written.format(question=alone, context=context)
    return PairExample(TextExample(prompt, f" {answer}", where), conversation)


def _history(fields: Fields) -> list[tuple[str, str]]:
    if not holds(fields.get("history")):
        return []
    pairs = nested(fields, "history")
    if not isinstance(pairs, list):
        raise Reject("history is not a list of [question, answer]", type(pairs).__name__)
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(side, str) for side in pair):
            raise Reject("history is not a list of [question, answer]")
    return [(unicode(question, "history"), unicode(answer, "history")) for question, answer in pairs]
