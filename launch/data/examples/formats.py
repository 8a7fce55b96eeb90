"""The formats of records: which one a record has, and what it becomes.

No field that changes what a row means is left out without a word: a format uses it, or rejects the row. What plays no
part (`unused_fields`) is named in the log.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from launch.common.errors import Reject
from launch.common.messages import shortened
from launch.data.examples.chat_messages import Message, learned_answers, messages
from launch.data.examples.columns import Columns
from launch.data.examples.kinds import ChatExample, Example, TextExample
from launch.data.examples.pairs import SYSTEM, instruction_output, instruction_response, question_answer
from launch.data.examples.template_kwargs import FIELDS as FOR_THE_TEMPLATE
from launch.data.examples.template_kwargs import template_kwargs
from launch.data.examples.tokenised import BESIDE, LEARNED_MASKS, ids_alone, tokens
from launch.data.examples.values import Fields, holds, optional_text, text, text_with_words
from launch.data.records import Record
from smoothing.core.options import DEFAULT_IGNORE_INDEX

GOOD_LABELS, BAD_LABELS = (True, "true", "1"), (False, "false", "0")  # numbers are equal to these
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
# Fields that change what a row means: a format that does not use one rejects the row.
MEANINGFUL = (*FOR_THE_TEMPLATE, *SYSTEM, "history", "context", "weight", *MEDIA)


@dataclass(frozen=True)
class Format:
    """A row of the table of formats.

    `needs`: the fields by which a record is recognised. `may`: what else is used. `learned`: for the guide.
    """

    needs: tuple[str, ...]
    may: tuple[str, ...]
    learned: str
    convert: Callable[[Fields, str], Example]


def detect_format(fields: Fields) -> str | None:
    """Return the first format whose fields all have a value; failing that, the first whose fields are all present."""
    filled = {name for format in FORMATS.values() for name in format.needs if _is_filled(fields, name)}
    for names in (filled, set(fields)):
        for name, format in FORMATS.items():
            if names.issuperset(format.needs):
                return name
    return None


def _is_filled(fields: Fields, name: str) -> bool:
    try:
        return fields.get(name) not in (None, [])  # data sets that were put together have either
    except Reject:  # it has a value, which cannot be read
        return True


def to_example(record: Record, format: str) -> Example:
    """Convert `record` from `format` to an example. Raises Reject for a field that cannot be used."""
    if format not in FORMATS:
        raise ValueError(f"format should be one of {', '.join(FORMATS)}, got {format!r}")
    try:
        _check_meaningful(record.fields, format)
        return FORMATS[format].convert(record.fields, record.where)
    except RecursionError:
        raise Reject("nested too deeply") from None


@cache
def used_fields(format: str) -> frozenset[str]:
    """The fields that a format uses, or looks at and rejects."""
    return frozenset((*FORMATS[format].needs, *FORMATS[format].may, *_rejected(format)))


def unused_fields(names: Iterable[str], format: str, columns: Columns | None = None) -> set[str]:
    """Which of a record's fields play no part in it; what no record of the data uses is for the log.

    Args:
        names: the record's fields as they were read, before `columns` renamed them.
    """
    return set(names) - used_columns(format, columns or Columns())


def used_columns(format: str, columns: Columns) -> set[str]:
    """The columns of the data that a format uses, under the names that `columns` gives them."""
    return columns.columns_of(used_fields(format))


def known_formats() -> str:
    """The table of formats in one line, for errors."""
    return "; ".join(f"{name} ({', '.join(format.needs)})" for name, format in FORMATS.items())


@cache
def _rejected(format: str) -> tuple[str, ...]:
    """The fields that change the meaning of a row, and that `format` cannot use."""
    if "input_ids" in FORMATS[format].needs:
        return ("weight",)  # the others are what its tokens were made of
    return tuple(name for name in MEANINGFUL if name not in (*FORMATS[format].needs, *FORMATS[format].may))


def _check_meaningful(fields: Fields, format: str) -> None:
    for name in _rejected(format):
        value = fields.get(name)
        if holds(value) and not (name == "weight" and value == 1):
            raise Reject(
                f"{name!r} changes what a row means, and {format} rows cannot use it: rename it if it is "
                f"something else (--columns other={name})"
            )
    if not holds(fields.get("input_ids")):
        for name in LEARNED_MASKS:
            if holds(fields.get(name)):
                raise Reject(f"{name!r} says which tokens are learned, but there are no input_ids")


def _conversation(name: str) -> Callable[[Fields, str], ChatExample]:
    return lambda fields, where: _chat(fields, where, *messages(fields, name))


def _chat(fields: Fields, where: str, conversation: list[Message], learned: list[bool]) -> ChatExample:
    system = optional_text(fields, *SYSTEM)
    first = conversation[0]
    if system and first["role"] == "system" and first["content"] != system:
        raise Reject("a system field and another system message")
    if system and first["role"] != "system":
        conversation, learned = [{"role": "system", "content": system}, *conversation], [False, *learned]
    return ChatExample(conversation, where, learned_answers(conversation, learned), template_kwargs(fields))


def _prompt_completion(fields: Fields, where: str) -> TextExample | ChatExample:
    """Texts, or lists of messages; a text beside a list is its one message. Of a prompt nothing is learned."""
    _check_label(fields.get("label"))
    if not any(isinstance(fields.get(name), list) for name in ("prompt", "completion")):
        for name in CHAT_FIELDS:
            if holds(fields.get(name)):
                raise Reject(
                    f"{name!r} belongs to a conversation, but prompt and completion are texts: "
                    "--columns question=prompt,answer=completion makes them one"
                )
        return TextExample(text(fields, "prompt"), text_with_words(fields, "completion"), where)
    asked = _side(fields, "prompt", "user")
    answered, learned = (
        messages(fields, "completion") if isinstance(fields.get("completion"), list) else (None, [True])
    )
    answered = answered or _side(fields, "completion", "assistant")
    if asked and asked[-1]["role"] == answered[0]["role"] == "assistant":
        raise Reject("the prompt ends with a message of the assistant, and the completion begins with one")
    return _chat(fields, where, [*asked, *answered], [False] * len(asked) + learned)


def _check_label(label: Any) -> None:
    """Raise Reject for a completion that is not to be learned, as KTO's data mark it."""
    if not holds(label):
        return
    said = label.strip().lower() if isinstance(label, str) else label
    if said in BAD_LABELS:
        raise Reject("label is false: a completion that is marked as a bad one")
    if said not in GOOD_LABELS:
        raise Reject(
            "label is neither true nor false: rename it if it is something else (--columns other=label)",
            shortened(repr(label)),
        )


def _side(fields: Fields, name: str, role: str) -> list[Message]:
    if isinstance(fields.get(name), list):
        return messages(fields, name)[0]
    value = text_with_words(fields, name) if role == "assistant" else text(fields, name)
    return [{"role": role, "content": value}] if value.strip() else []


def _text(fields: Fields, where: str) -> TextExample:
    return TextExample("", text_with_words(fields, "text"), where)


def _preference(fields: Fields, where: str) -> Example:
    """Raises Reject: which of two answers is better is nothing that this loss learns from."""
    chosen = fields.get("chosen")
    first = chosen[0] if isinstance(chosen, list) and chosen else None
    if isinstance(first, dict) and not {"assistant", "gpt"} & {str(first.get("role")), str(first.get("from"))}:
        name = "messages"
    else:
        pairs = {"prompt": "completion", "question": "answer", "instruction": "output"}
        name = next((pairs[question] for question in pairs if question in fields), "text")
    raise Reject(f"chosen and rejected are a preference: to learn the chosen answers, add --columns {name}=chosen")


CHAT_FIELDS = (*SYSTEM, *FOR_THE_TEMPLATE)
PAIR_FIELDS = (*CHAT_FIELDS, "history")
ANSWERS = "the assistant's messages, except those with `weight: 0` or `train: false`"
# In the order in which they are tried.
FORMATS: dict[str, Format] = {
    "already tokenised": Format(
        ("input_ids", "labels"),
        (*LEARNED_MASKS, *BESIDE),
        f"tokens whose label is not {DEFAULT_IGNORE_INDEX}",
        tokens,
    ),
    **{
        f"token ids with {mask}": Format(
            ("input_ids", mask),
            (*(other for other in LEARNED_MASKS if other != mask), *BESIDE),
            "tokens whose mask is 1",
            tokens,
        )
        for mask in LEARNED_MASKS
    },
    "messages": Format(("messages",), CHAT_FIELDS, ANSWERS, _conversation("messages")),
    "prompt/completion": Format(
        ("prompt", "completion"), (*CHAT_FIELDS, "label"), "the completion", _prompt_completion
    ),
    "ShareGPT": Format(("conversations",), CHAT_FIELDS, ANSWERS, _conversation("conversations")),
    "ShareGPT (conversation)": Format(("conversation",), CHAT_FIELDS, ANSWERS, _conversation("conversation")),
    "instruction/input/output": Format(
        ("instruction", "output"), ("input", "context", *PAIR_FIELDS), "the output", instruction_output
    ),
    "instruction/context/response": Format(
        ("instruction", "response"), ("context", "input", *PAIR_FIELDS), "the response", instruction_response
    ),
    "question/answer": Format(("question", "answer"), ("context", *PAIR_FIELDS), "the answer", question_answer),
    "preference": Format(("chosen", "rejected"), (), "nothing: rejected with what to do", _preference),
    "text": Format(("text",), (), "every token", _text),
    "token ids alone": Format(("input_ids",), (), "nothing: rejected with what to do", ids_alone),
}
