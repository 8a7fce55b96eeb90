"""What a row gives its chat template besides messages: tools, documents, and settings such as `enable_thinking`."""

from typing import Any

from launch.common.errors import Reject
from launch.config.chat_template import reserved
from launch.data.examples.values import Fields, from_json, holds, nested, only_one

TOOLS = ("tools", "functions")  # OpenAI's, and its older spelling
FIELDS = (*TOOLS, "documents", "chat_template_kwargs")


def template_kwargs(fields: Fields) -> dict[str, Any]:
    """The arguments for the template that a row holds. Raises Reject for one that cannot be used."""
    kwargs: dict[str, Any] = {}
    if holds(fields.get("chat_template_kwargs")):
        kwargs = nested(fields, "chat_template_kwargs")
        if not isinstance(kwargs, dict):
            raise Reject("chat_template_kwargs is not an object", type(kwargs).__name__)
        if name := reserved(kwargs):
            raise Reject("chat_template_kwargs sets what is not the template's own", name)
    kwargs = dict(kwargs)
    if name := only_one(fields, *TOOLS):
        kwargs["tools"] = [_tool(tool) for tool in _list(fields, name)]
    if holds(fields.get("documents")):
        kwargs["documents"] = _list(fields, "documents")
        if not all(isinstance(document, dict) for document in kwargs["documents"]):
            raise Reject("documents is not a list of objects with title and text")
    return kwargs


def _list(fields: Fields, name: str) -> list[Any]:
    value = nested(fields, name)
    if not isinstance(value, list):
        raise Reject(f"{name} is not a list", type(value).__name__)
    return value


def _tool(tool: Any) -> dict[str, Any]:
    """A tool as OpenAI writes it, {type, function: {name, ...}}: templates look for the name there."""
    if isinstance(tool, str):
        tool = from_json(tool, "a tool")
    if not isinstance(tool, dict):
        raise Reject("a tool is not an object", type(tool).__name__)
    if "function" not in tool and "name" in tool and tool.get("type", "function") == "function":
        tool = {"type": "function", "function": {name: tool[name] for name in tool if name != "type"}}
    if "function" in tool:
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Reject("a tool names no function")
    return tool
