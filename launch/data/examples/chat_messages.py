"""Conversations in the one spelling that chat templates expect: messages with a role and a text.

Every message has a `role`, one of `system`, `user`, `assistant` and `tool`, and a `content`, which is text. A call of
tools without one has "": of 108 templates that were tried, fewer fail with that than with null or without the key.
"""

from typing import Any

from launch.common.errors import Reject
from launch.common.messages import shortened
from launch.data.examples.tool_calls import tool_calls
from launch.data.examples.values import Fields, holds, nested, unicode

Message = dict[str, Any]
# A template skips a role that it does not know, often without a word.
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "bot", "ai", "chatgpt", "chatbot"),
    "tool": ("tool", "function", "ipython", "observation", "environment", "tool_response", "function_response"),
}
CALL = ("function_call", "tool_call")  # roles of ShareGPT: the assistant's message whose text is a call
SPELLINGS = {spelling: role for role, spellings in ROLES.items() for spelling in spellings}
SPELLINGS |= dict.fromkeys(CALL, "assistant")
ROLE_KEYS, TEXT_KEYS = ("role", "from"), ("content", "value")
LEARN_KEYS = ("weight", "train", "loss")  # of OpenAI, Axolotl and ms-swift
TEXT_PARTS = ("text", "input_text", "output_text")


def messages(fields: Fields, name: str) -> tuple[list[Message], list[bool]]:
    """The messages of a field, and which of them are to be learned: the assistant's, unless they say otherwise.

    Raises Reject for a field that is no list of messages.
    """
    value = nested(fields, name)
    if not isinstance(value, list) or not value:
        raise Reject(f"{name} is not a list of messages", type(value).__name__)
    read = [_message(message) for message in value]
    return [message for message, _ in read], [learned for _, learned in read]


def learned_answers(conversation: list[Message], learned: list[bool]) -> tuple[int, ...]:
    """The indices of the answers to learn. Raises Reject if there is none, or if one of them is empty."""
    answers = tuple(index for index, learn in enumerate(learned) if learn)
    if not answers:
        spoken = any(message["role"] == "assistant" for message in conversation)
        raise Reject("no answer is to be learned (weight 0 or train: false)" if spoken else "no assistant message")
    for index in answers:
        if not conversation[index]["content"].strip() and "tool_calls" not in conversation[index]:
            raise Reject("empty assistant message")
    return answers


def _message(message: Any) -> tuple[Message, bool]:
    if not isinstance(message, dict):
        raise Reject("a message is not {role, content}", type(message).__name__)
    message = {key: value for key, value in message.items() if value is not None}
    spelling, role = _role(message)
    calls = _calls(message, spelling)
    read: Message = {"role": role, "content": "" if spelling in CALL else _content(message, role, bool(calls))}
    taken = (*ROLE_KEYS, *TEXT_KEYS, *LEARN_KEYS, "tool_calls", "function_call")
    read |= {key: value for key, value in message.items() if key not in taken}
    if calls:
        read["tool_calls"] = calls
    return read, _learned(message, role)


def _role(message: Message) -> tuple[str, str]:
    """A message's role as it is spelled, and as templates know it."""
    given = [message[key] for key in ROLE_KEYS if key in message]
    if not given:
        raise Reject("a message is not {role, content}", "no role")
    spelled = [role.strip().lower().replace("-", "_") if isinstance(role, str) else "" for role in given]
    roles = {SPELLINGS.get(spelling) for spelling in spelled}
    if None in roles:
        raise Reject("unknown role", shortened(repr(given[0])))
    if len(roles) > 1:
        raise Reject("a message has two roles", " and ".join(spelled))
    return spelled[0], SPELLINGS[spelled[0]]


def _content(message: Message, role: str, has_calls: bool) -> str:
    given = [message[key] for key in TEXT_KEYS if key in message]
    if not given:
        if has_calls or role == "tool":  # a tool may return nothing
            return ""
        raise Reject("a message is not {role, content}", "no content")
    if given.count(given[0]) < len(given):
        raise Reject("a message has both content and value")
    if isinstance(given[0], list):
        return "".join(map(_part, given[0]))
    if not isinstance(given[0], str):
        raise Reject("content is not text", type(given[0]).__name__)
    return unicode(given[0], "content")


def _part(part: Any) -> str:
    """The text of a part of a content."""
    if isinstance(part, dict):
        kind = part.get("type", "text")
        if kind not in TEXT_PARTS:
            raise Reject("a message holds a part that is not text", shortened(str(kind)))
        part = part.get("text")
    if not isinstance(part, str):
        raise Reject("content is not text", "a part without text")
    return unicode(part, "content")


def _calls(message: Message, spelling: str) -> list[dict[str, Any]]:
    written = [message[key] for key in ("tool_calls", "function_call") if key in message and holds(message[key])]
    if spelling in CALL:
        written += [message[key] for key in TEXT_KEYS if key in message][:1] or [""]
    if len(written) > 1:
        raise Reject("a message spells its tool calls twice")
    return tool_calls(written[0]) if written else []


def _learned(message: Message, role: str) -> bool:
    """Whether a message is to be learned. Raises Reject for what cannot be: a part of it, or another role's."""
    if "train_detail" in message and holds(message["train_detail"]):
        raise Reject("train_detail is not supported: an answer is learned whole, or not at all")
    said = {key: message[key] for key in LEARN_KEYS if key in message and holds(message[key])}
    for key, value in said.items():
        if type(value) not in (bool, int, float) or value not in (0, 1):
            raise Reject(
                f"{key} of a message is neither 0 nor 1: nothing between them is supported", shortened(repr(value))
            )
    if len(set(said.values())) > 1:
        raise Reject("a message says both that it is learned and that it is not", " and ".join(said))
    wanted = all(said.values())
    if role != "assistant" and said and wanted:
        raise Reject("a message that is not the assistant's is marked as one to learn", role)
    return role == "assistant" and wanted
