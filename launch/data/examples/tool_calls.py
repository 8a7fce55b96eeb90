"""Calls of tools in the one spelling that chat templates expect: OpenAI's, with arguments as an object.

In OpenAI's own files the arguments are JSON text. Few templates take that: most write such a text as a JSON string
into the conversation, quoted a second time, or fail.
"""

import json
from typing import Any

from launch.common.errors import Reject
from launch.common.messages import shortened
from launch.data.examples.values import from_json, holds


def tool_calls(value: Any) -> list[dict[str, Any]]:
    """The calls that `value` holds: a list of them or one, in objects or in JSON text.

    Raises Reject for what is no call, and for arguments that are no JSON object: a model would learn to write them.
    """
    calls = from_json(value, "a tool call") if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    return [_call(call) for call in calls]


def with_arguments_as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages as OpenAI's files spell calls, for the few templates that take nothing else.

    Arguments are JSON text, and a message of calls alone has no content.
    """
    return [_as_text(message) if message.get("tool_calls") else message for message in messages]


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"].get("arguments", {}))}}
        for call in message["tool_calls"]
    ]
    content = {"content": message.get("content") or None}
    return {**message, **content, "tool_calls": calls}


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise Reject("a tool call is not an object", type(call).__name__)
    if "function" in call:
        function, others = call["function"], {name: call[name] for name in call if name not in ("function", "type")}
    else:  # without OpenAI's frame
        function, others = {name: call[name] for name in call if name not in ("id", "type")}, {}
        others = {"id": call["id"]} if "id" in call else {}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not holds(function["name"]):
        raise Reject("a tool call names no function")
    function = dict(function)
    given = [name for name in ("arguments", "parameters") if name in function]
    if len(given) > 1:
        raise Reject("a tool call has both arguments and parameters")
    arguments = _arguments(function.pop(given[0])) if given else {}
    return {"type": "function", **others, "function": {**function, "arguments": arguments}}


def _arguments(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = from_json(value, "arguments of a tool call") if value.strip() else {}
    if not isinstance(value, dict):
        raise Reject("arguments of a tool call are not an object", shortened(repr(value)))
    return value
