"""The chat template as a function from messages to text. It is a program that came with the model.

It may raise anything, loop for ever, or print the date; each call has a time limit, and the date is the run's.
"""

import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property
from typing import Any

from transformers.utils import chat_template_utils

from launch.common.errors import Reject
from launch.common.messages import error_line, typed_error_line
from launch.data.examples.special_tokens import special_pattern
from launch.data.examples.values import unicode

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
SECONDS_A_ROW = 20
LARGEST_TEXT = 1 << 22  # characters
QUESTION, ANSWER = "Qj7", "Zk3"  # contents of a conversation that shows how a template writes one

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]


class OutOfTime(BaseException):
    """A row took longer than its time limit; no handler of errors in a library is to take it for one."""


@dataclass
class Turn:
    """How a template writes an answer: its header, whether a generation prompt lacks that, its stop, and the rest."""

    known: bool = False
    header: str = ""
    missing_header: str = ""
    stop: str | None = None
    trailer: str = ""  # what follows the last answer's stop
    inner_stop: str | None = None  # the stop of an answer that another turn follows


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: Its `chat_template` is used, with its special tokens.
        arguments: Variables for the template; those of a row come on top.
        day: The date that the template is told, today's if None.
    """

    def __init__(self, tokenizer, arguments: Mapping[str, Any] | None = None, day: date | None = None):
        self.tokenizer = tokenizer
        self.variables = {**tokenizer.special_tokens_map, **(arguments or {})}
        self.day = day
        self.special = special_pattern(tokenizer)

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

    def reads(self, name: str) -> bool:
        """Return whether a variable's name stands in the template."""
        return name in str(self.tokenizer.chat_template)

    @property
    def dated(self) -> bool:
        """Whether the template may print the date."""
        return self.reads("strftime_now")

    def prompt(self, messages: Messages, arguments: Mapping[str, Any]) -> str:
        """Return the text that the model answers, with the answer's header, which the model does not write."""
        opened = self.render(messages, arguments, generation_prompt=True)
        if not self._turn.known and opened == self.render(messages, arguments):
            raise Reject("the chat template does not show where an answer begins")
        return opened + self._turn.missing_header

    def answered(self, messages: Messages, arguments: Mapping[str, Any]) -> str:
        """Return the text of a conversation up to its last answer's stop."""
        return self.up_to_stop(self.render(messages, arguments))

    def up_to_stop(self, text: str) -> str:
        """Return the text of a conversation without what follows its last answer's stop."""
        return text.removesuffix(self._turn.trailer)

    @property
    def end_of_turn(self) -> str | None:
        """The special token that the template writes after an answer, None if it writes none."""
        return self._turn.stop

    @property
    def answer_header(self) -> str:
        """What stands between a question and its answer; "" for nothing, or where it cannot be told."""
        return self._turn.header

    @cached_property
    def special_tail(self) -> re.Pattern:
        """Finds the special tokens, with blanks between and behind them, that a text ends with."""
        special = f"(?:{self.special.pattern})"
        return re.compile(rf"{special}(?:\s*{special})*\s*\Z")

    @cached_property
    def stops(self) -> frozenset[str]:
        """The tokens that end an answer: the template's ends of turn, and EOS."""
        return frozenset(filter(None, (self._turn.stop, self._turn.inner_stop, self.tokenizer.eos_token)))

    @cached_property
    def _turn(self) -> "Turn":
        try:
            asked = self.render(_turns(QUESTION), {})
            opened = self.render(_turns(QUESTION), {}, generation_prompt=True)
            answered = self.render(_turns(QUESTION, ANSWER), {})
        except Reject:
            return Turn()
        before, found, after = answered.rpartition(ANSWER)
        if not found:
            return Turn()
        header = before.removeprefix(asked) if before.startswith(asked) else ""
        header = header if header.strip() else ""  # a mere blank belongs to the answer
        stop = self.special.match(after.lstrip())
        turn = Turn(
            known=True,
            header=opened.removeprefix(asked) if opened.startswith(asked) and opened != asked else header,
            missing_header=header if opened == asked else "",
            stop=stop[0] if stop else None,
            trailer=after.lstrip()[stop.end() :] if stop else "",
        )
        try:
            longer = self.render(_turns(QUESTION, ANSWER, QUESTION, ANSWER), {})
        except Reject:
            return turn
        behind_answer = self.special.match(longer.partition(ANSWER)[2].lstrip())
        behind_question = self.special.match(longer.partition(QUESTION)[2].lstrip())
        if stop and behind_answer and behind_question and behind_answer[0] == behind_question[0]:
            turn.inner_stop = behind_answer[0]  # what ends every turn, not what begins the next one
        return turn

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
                    **{**self.variables, **arguments},
                )
        except Exception as error:
            detail = f"{typed_error_line(error, 80)}; change the row, or give another --chat_template"
            raise Reject("the chat template refuses the conversation", detail) from None
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


def _turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
