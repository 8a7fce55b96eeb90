"""The formats of records, and their conversion to examples."""

from collections.abc import Mapping
from typing import Any

from launch.common.errors import Reject
from launch.common.messages import shortened
from launch.data.examples.kinds import ChatExample, Example, PairExample, TextExample, TokenExample
from launch.data.records import Record

FORMATS = {
    "already tokenised": ("input_ids", "labels"),
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "instruction/input/output": ("instruction", "output"),
    "question/answer": ("question", "answer"),
}
QUESTION_PROMPT = "Question: {question}\nAnswer:"
# The space belongs to the answer: a model continues "Answer:" with " 4", not with "4".
ANSWER_COMPLETION = " {answer}"
INSTRUCTION_PROMPT = "Instruction: {instruction}\nResponse:"
INSTRUCTION_INPUT_PROMPT = "Instruction: {instruction}\nInput: {input}\nResponse:"
RESPONSE_COMPLETION = " {output}"
ROLES = ("system", "user", "assistant", "tool")


def detect_format(fields: Mapping[str, Any]) -> str | None:
    """Return the first format whose fields all have a value; failing that, the first whose fields are all present."""
    filled = {name for names in FORMATS.values() for name in names if _is_filled(fields, name)}
    for names in (filled, set(fields)):
        for format, needed in FORMATS.items():
            if names.issuperset(needed):
                return format
    return None


def _is_filled(fields: Mapping[str, Any], name: str) -> bool:
    try:
        return fields.get(name) is not None
    except Reject:  # it has a value, which cannot be read
        return True


def to_example(record: Record, format: str) -> Example:
    """Convert `record` from `format` to an example. Raises Reject for a field that cannot be used."""
    fields, where = record.fields, record.where
    if format == "already tokenised":
        return TokenExample(_ids(fields, "input_ids"), _ids(fields, "labels"), where)
    if format == "messages":
        messages = _messages(fields)
        answers = tuple(index for index, message in enumerate(messages) if message["role"] == "assistant")
        return ChatExample(messages, where, answers)
    if format == "prompt/completion":
        return TextExample(_text(fields, "prompt"), _answer(fields, "completion"), where)
    if format == "question/answer":
        question, answer = _text(fields, "question"), _answer(fields, "answer")
        text = QUESTION_PROMPT.format(question=question), ANSWER_COMPLETION.format(answer=answer)
        return _pair(question, answer, text, where)
    if format == "instruction/input/output":
        instruction, answer = _text(fields, "instruction"), _answer(fields, "output")
        context = _text(fields, "input") if fields.get("input") is not None else ""
        template = INSTRUCTION_INPUT_PROMPT if context.strip() else INSTRUCTION_PROMPT
        prompt = template.format(instruction=instruction, input=context)
        question = f"{instruction}\n\n{context}" if context.strip() else instruction
        return _pair(question, answer, (prompt, RESPONSE_COMPLETION.format(output=answer)), where)
    raise ValueError(f"format should be one of {', '.join(FORMATS)}, got {format!r}")


def _pair(question: str, answer: str, text: tuple[str, str], where: str) -> PairExample:
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return PairExample(TextExample(*text, where), ChatExample(chat, where, (1,)))


def _text(fields: Mapping[str, Any], name: str) -> str:
    if name not in fields:
        raise Reject(f"no field {name!r}")
    value = fields[name]
    if not isinstance(value, str):
        raise Reject(f"{name} is not text", type(value).__name__)
    return unicode(value, name)


def unicode(value: str, name: str) -> str:
    """Return `value` if it can be encoded as UTF-8, which tokenizers need. Raises Reject otherwise."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        raise Reject(f"{name} holds half a surrogate pair") from None
    return value


def _answer(fields: Mapping[str, Any], name: str) -> str:
    value = _text(fields, name)
    if not value.strip():
        raise Reject(f"empty {name}")
    return value


def _ids(fields: Mapping[str, Any], name: str) -> list[int]:
    ids = fields.get(name)
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise Reject(f"{name} is not a list of integers")
    return ids


def _messages(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Reject("messages is not a list of messages", type(messages).__name__)
    conversation = [_message(message) for message in messages]
    if conversation[-1]["role"] != "assistant":
        raise Reject("the last message is not the assistant's", conversation[-1]["role"])
    return conversation


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise Reject("a message is not {role, content}")
    role = message["role"]
    if role not in ROLES:
        raise Reject("unknown role", shortened(repr(role)))
    content = _text(message, "content")
    if role == "assistant" and not content.strip():
        raise Reject("empty assistant message")
    # Parquet fills in null for keys that only other messages have; templates test for presence.
    return {name: value for name, value in message.items() if value is not None}
