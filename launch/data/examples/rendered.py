"""A rendered conversation, and what a template may do unseen: leave out tools or words, or mix those of two roles."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from launch.common.errors import Reject
from launch.common.messages import shortened
from launch.data.examples.kinds import ChatExample
from launch.data.examples.render import ChatTemplate, Messages, Span

WAY_OUT = "give --chat_template a template that marks answers with {% generation %}"
OTHER_TEMPLATE = "give --chat_template a template that does, or leave it out"
# Two contents that share neither their first nor their last character, so that only their surroundings are alike.
OTHER_ANSWERS = ("Qx0Z", "7jWk")
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
WRITTEN_KEYS = {"role", "content", "tool_calls", "tool_call_id", "id", *THOUGHTS}  # looked for elsewhere, or mere ids


@dataclass
class Rendered:
    """A conversation's text, the characters to learn in order, and what the user may want to know."""

    text: str
    spans: list[Span]
    notes: list[str] = field(default_factory=list)


def check_tools(rendered: Rendered, example: ChatExample, template: ChatTemplate) -> None:
    """Raise Reject for tools, or learned calls of them, that the template leaves out."""
    learned = "".join(rendered.text[start:end] for start, end in rendered.spans)
    answers = [example.messages[index] for index in example.learned]
    calls = _names([call for message in answers for call in message.get("tool_calls") or []])
    words = "".join(message.get("content") or "" for message in answers)
    for name in _missing(calls, learned, words, template):
        if learned.count(name) < calls[name] or rendered.text == _under_another_name(name, example, template):
            raise Reject("the chat template does not write tool calls", OTHER_TEMPLATE)
    tools = _names(example.template_kwargs.get("tools") or [])
    said = str([(message.get("content"), message.get("tool_calls")) for message in example.messages]) if tools else ""
    if missing := _missing(tools, rendered.text, said, template):
        without = {key: value for key, value in example.template_kwargs.items() if key != "tools"}
        lost = any(rendered.text.count(name) < tools[name] for name in missing)
        if lost or rendered.text == render_or_none(template.render, example.messages, without):
            raise Reject("the chat template does not write tools", OTHER_TEMPLATE)


def _names(tools: list[Any]) -> Counter[str]:
    functions = [tool.get("function", tool) for tool in tools if isinstance(tool, dict)]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    return Counter(name for name in names if isinstance(name, str))


def _missing(names: Counter[str], text: str, words: str, template: ChatTemplate) -> list[str]:
    """Return the names that may not be written: those in a text may be words, or the template's own."""
    return [
        name for name, count in names.items() if text.count(name) < count + words.count(name) or template.reads(name)
    ]


def _under_another_name(name: str, example: ChatExample, template: ChatTemplate) -> str | None:
    """Return the text of a conversation whose calls of one tool are calls of another."""

    def renamed(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return call | {"function": function | {"name": OTHER_ANSWERS[0]}} if function["name"] == name else call

    messages = [
        message | {"tool_calls": [renamed(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in example.messages
    ]
    return render_or_none(template.render, messages, example.template_kwargs)


def check_variables(example: ChatExample, template: ChatTemplate) -> None:
    """Raise Reject for what a row gives the template and the template never reads."""
    if unread := [name for name in example.template_kwargs if not template.reads(name)]:
        raise Reject(f"the chat template does not read {unread[0]}", OTHER_TEMPLATE)


def check_alone(rendered: Rendered, example: ChatExample, template: ChatTemplate) -> None:
    """Raise Reject where words of others stand in an answer: a tool's result may stand in the turn of its call."""
    if not any(message.get("tool_calls") for message in example.messages):
        return
    others = [
        message if message["role"] == "assistant" else {**message, "content": OTHER_ANSWERS[0]}
        for message in example.messages
    ]
    written = render_or_none(template.render, others, example.template_kwargs)
    if written is not None and not all(rendered.text[start:end] in written for start, end in rendered.spans):
        raise Reject("the chat template writes words of another role into an answer", WAY_OUT)


def left_out(text: str, example: ChatExample, template: ChatTemplate) -> list[str]:
    """Return notes on what the template leaves out: words of a role, thoughts, and keys of messages."""
    roles = set()
    for message in example.messages:
        content = message.get("content")
        if isinstance(content, str) and content.strip() not in text:
            roles.add(message["role"])
    written = squeezed(text) if roles else ""
    lost = {
        message["role"]
        for message in example.messages
        if message["role"] in roles and squeezed(message.get("content") or "") not in written
    }
    notes = [f"the chat template leaves out or changes words of the role {role}" for role in sorted(lost)]
    thoughts = (message.get(name) for message in example.messages for name in THOUGHTS)
    if any(isinstance(thought, str) and thought.strip() not in text for thought in thoughts):
        notes.append("the chat template leaves out thoughts (reasoning_content)")
    keys = {key for message in example.messages for key in message} - WRITTEN_KEYS
    if unread := sorted(key for key in keys if not template.reads(key)):
        notes.append(f"the chat template does not read {shortened(', '.join(unread))} of messages")
    return notes


def render_or_none(
    render: Callable[[Messages, Mapping[str, Any]], str], messages: Messages, arguments: Mapping[str, Any]
) -> str | None:
    """Return the text of a conversation, None for one without messages or one that the template refuses."""
    if not messages:
        return None
    try:
        return render(messages, arguments)
    except Reject:
        return None


def squeezed(text: str) -> str:
    """Return a text without its blanks."""
    return "".join(text.split())
