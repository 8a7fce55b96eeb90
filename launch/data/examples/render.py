"""The chat template as a function from messages to text. It is a program that came with the model.

It may raise anything, loop for ever, or print the date; each call has a time limit, and the date is the run's.
"""

import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from functools import cached_property
from typing import Any

from transformers.utils import chat_template_utils

from launch.common.errors import Reject
from launch.common.messages import error_line, typed_error_line
from launch.data.examples.values import unicode

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
SECONDS_A_ROW = 20
LARGEST_TEXT = 1 << 22  # characters
QUESTION, ANSWER = "Qj7", "Zk3"  # contents of a conversation that shows how a template writes one

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]


class OutOfTime(BaseException):
    """A row took longer than its time limit; no handler of errors in a library is to take it for one."""


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: Its `chat_template` is used, with its special tokens.
        arguments: Variables for the template; those of a row come on top.
        day: The date that the template is told, today's if None.
    """

    def __init__(self, tokenizer, arguments: Mapping[str, Any] | None = None, day: date | None = None):
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self.day = day
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special = re.compile("|".join(map(re.escape, sorted(filter(None, special), reverse=True))) or r"(?!)")

    def render(self, messages: Messages, arguments: Mapping[str, Any], generation_prompt: bool = False) -> str:
        """Return the text of a conversation. Raises Reject for one that the template refuses."""
        return self._render(messages, arguments, generation_prompt, marks=False)[0]

    def render_with_marks(self, messages: Messages, arguments: Mapping[str, Any]) -> tuple[str, list[Span]]:
        """Return the text of a conversation and the characters within `{% generation %}`."""
        text, marks = self._render(messages, arguments, generation_prompt=False, marks=True)
        return text, [(start, end) for start, end in marks if text[start:end].strip()]

    def has_marks(self, arguments: Mapping[str, Any]) -> bool:
        """Return whether the template marks what the assistant wrote."""
        return GENERATION.search(self._source(arguments)) is not None

    @cached_property
    def end_of_turn(self) -> str | None:
        """The special token that the template writes after an answer, if it writes one."""
        try:
            text = self.render(_conversation(QUESTION, ANSWER), {})
        except Reject:
            return None
        if ANSWER not in text:
            return None
        after = text.rpartition(ANSWER)[2]
        found = self.special.match(after.lstrip())
        return found[0] if found else None

    @cached_property
    def stops(self) -> frozenset[str]:
        """The tokens that end an answer: the template's end of turn, and EOS."""
        return frozenset(filter(None, (self.end_of_turn, self.tokenizer.eos_token)))

    @cached_property
    def answer_header(self) -> str:
        """What a generation prompt adds: the header of an answer, which the model does not write; "" if nothing."""
        try:
            question = _conversation(QUESTION)
            asked = self.render(question, {})
            opened = self.render(question, {}, generation_prompt=True)
        except Reject:
            return ""
        return opened.removeprefix(asked) if opened.startswith(asked) else ""

    @cached_property
    def opens_answers(self) -> bool:
        """Whether a generation prompt changes the text at all; true for a template that refuses to be asked."""
        try:
            question = _conversation(QUESTION)
            return self.render(question, {}, generation_prompt=True) != self.render(question, {})
        except Reject:
            return True

    def _source(self, arguments: Mapping[str, Any]) -> str:
        try:
            return self.tokenizer.get_chat_template(None, arguments.get("tools"))
        except ValueError as error:  # several templates without a default
            raise Reject("the tokenizer has no default chat template", error_line(error, 80)) from None

    def _render(
        self, messages: Messages, arguments: Mapping[str, Any], generation_prompt: bool, marks: bool
    ) -> tuple[str, list[Span]]:
        source = self._source(arguments)
        try:
            with _date(self.day):
                rendered, spans = chat_template_utils.render_jinja_template(
                    conversations=[list(messages)],
                    chat_template=source,
                    return_assistant_tokens_mask=marks,
                    add_generation_prompt=generation_prompt,
                    **{**self.tokenizer.special_tokens_map, **self.arguments, **arguments},
                )
        except Exception as error:
            raise Reject("the chat template refuses the conversation", typed_error_line(error, 80)) from None
        if len(rendered[0]) > LARGEST_TEXT:
            raise Reject(f"longer than {LARGEST_TEXT:,} characters", f"{len(rendered[0]):,}")
        return unicode(rendered[0], "the rendered conversation"), spans[0] if marks else []


@contextmanager
def row_time_limit(seconds: float = SECONDS_A_ROW) -> Iterator[None]:
    """Raise Reject in the body if it takes longer; no limit outside the main thread, where signals do not arrive."""
    others = signal.getitimer(signal.ITIMER_REAL)[0]
    if threading.current_thread() is not threading.main_thread() or 0 < others < seconds:
        yield
        return

    def out_of_time(*_):
        raise OutOfTime

    previous = signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    started = time.monotonic()
    try:
        yield
    except OutOfTime:
        raise Reject(f"takes longer than {seconds:g} seconds to render and to tokenise") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if others:  # somebody else's alarm goes on
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, others - (time.monotonic() - started)))


@contextmanager
def _date(day: date | None) -> Iterator[None]:
    """Make the templates' `strftime_now` print the beginning of `day`."""
    if day is None:
        yield
        return

    class Day(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(day.year, day.month, day.day, tzinfo=tz)

    chat_template_utils.datetime = Day
    try:
        yield
    finally:
        chat_template_utils.datetime = datetime


def _conversation(question: str, answer: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": question}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]
