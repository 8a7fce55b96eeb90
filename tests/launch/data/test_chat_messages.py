"""Conversations in all their spellings come out as messages that templates know, with the answers to learn."""

import json

import pytest

from launch.common.errors import Reject
from launch.data.encode import encode
from launch.data.examples.formats import detect_format, to_example
from launch.data.examples.kinds import ChatExample
from launch.data.records import Record
from tests.support.tokenizers import byte_level, learned_texts

HI, HO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def convert(*messages: dict) -> ChatExample:
    example = to_example(Record({"messages": list(messages)}, "f:1"), "messages")
    assert isinstance(example, ChatExample)
    return example


def called(*calls: tuple[str, dict], content: str = "", **others) -> dict:
    made = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return {"role": "assistant", "content": content, "tool_calls": made, **others}


ADD = {"name": "add", "arguments": {"a": 1}}
WIRE = {"name": "add", "arguments": '{"a": 1}'}  # as OpenAI's files have it
MESSAGES = {
    "human": ({"from": "human", "value": "x"}, {"role": "user", "content": "x"}),
    "gpt": ({"from": "gpt", "value": "x"}, {"role": "assistant", "content": "x"}),
    "model": ({"role": "Model", "content": "x"}, {"role": "assistant", "content": "x"}),
    "bot": ({"from": "bot", "content": "x"}, {"role": "assistant", "content": "x"}),
    "developer": ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
    "function": (
        {"role": "function", "name": "add", "content": "2"},
        {"role": "tool", "content": "2", "name": "add"},
    ),
    "ipython": ({"role": "ipython", "content": "2"}, {"role": "tool", "content": "2"}),
    "observation": ({"from": "observation", "value": "2"}, {"role": "tool", "content": "2"}),
    "function-response": ({"from": "function-response", "value": "2"}, {"role": "tool", "content": "2"}),
    "a tool that returns nothing": ({"role": "tool", "content": None}, {"role": "tool", "content": ""}),
    "two spellings of one role": ({"role": "user", "from": "human", "value": "x"}, {"role": "user", "content": "x"}),
    "null keys": (HI | {"tool_calls": None, "name": None}, HI),
    "keys of the template's own": (HO | {"reasoning_content": "r", "name": "n"},) * 2,
    "parts": (
        {"role": "user", "content": [{"type": "text", "text": "a "}, "b", {"type": "input_text", "text": "c"}]},
        {"role": "user", "content": "a bc"},
    ),
    "parts that Parquet filled": (
        {"role": "user", "content": [{"type": "text", "text": "a", "image_url": None}]},
        {"role": "user", "content": "a"},
    ),
    "a call, content null": (
        {"role": "assistant", "content": None, "tool_calls": [{"function": WIRE}]},
        called(("add", {"a": 1})),
    ),
    "a call, content empty": (
        {"role": "assistant", "content": "", "tool_calls": [{"function": ADD}]},
        called(("add", {"a": 1})),
    ),
    "a call, no content": (
        {"role": "assistant", "tool_calls": [{"type": "function", "function": ADD}]},
        called(("add", {"a": 1})),
    ),
    "a call after words": (HO | {"tool_calls": [{"function": ADD}]}, called(("add", {"a": 1}), content="ho")),
    "calls as JSON text": (
        {"role": "assistant", "tool_calls": json.dumps([{"function": WIRE}, {"function": {"name": "now"}}])},
        called(("add", {"a": 1}), ("now", {})),
    ),
    "a call without a frame": ({"role": "assistant", "tool_calls": [ADD]}, called(("add", {"a": 1}))),
    "a call with parameters": (
        {"role": "assistant", "tool_calls": [{"name": "add", "parameters": {"a": 1}}]},
        called(("add", {"a": 1})),
    ),
    "a call with an id": (
        {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": ADD}]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}],
        },
    ),
    "a call without arguments": (
        {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": ""}}]},
        called(("now", {})),
    ),
    "arguments with a null": (
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": null}'}}]},
        called(("add", {"a": None})),
    ),
    "arguments that Parquet filled": (
        {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": None}}}]},
        called(("add", {"a": 1})),
    ),
    "no calls": (HO | {"tool_calls": []}, HO),
    "function_call": ({"role": "assistant", "content": None, "function_call": WIRE}, called(("add", {"a": 1}))),
    "ShareGPT's function_call": ({"from": "function_call", "value": json.dumps(WIRE)}, called(("add", {"a": 1}))),
    "ShareGPT's function_call of two": (
        {"from": "function_call", "value": json.dumps([ADD, {"name": "now", "arguments": {}}])},
        called(("add", {"a": 1}), ("now", {})),
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_a_message_in_the_spelling_of_templates(case):
    written, expected = MESSAGES[case]
    assert convert(HI, written, HO).messages == [HI, expected, HO]


LEARNED = {
    "all": ([HI, HO, HI, HO], (1, 3)),
    "a last message of the user": ([HI, HO, HI], (1,)),
    "weight 0": ([HI, HO | {"weight": 0}, HI, HO | {"weight": 1}], (3,)),
    "weight 0.0, as Parquet may have it": ([HI, HO | {"weight": 0.0}, HI, HO | {"weight": 1.0}], (3,)),
    "train": ([HI | {"train": False}, HO | {"train": True}, HI | {"train": False}, HO | {"train": False}], (1,)),
    "loss": ([HI, HO | {"loss": False}, HI, HO | {"loss": None}], (3,)),
    "an answer that is empty and not learned": (
        [HI, {"role": "assistant", "content": "", "weight": 0}, HI, HO],
        (3,),
    ),
    "a call": ([HI, called(("add", {})), {"role": "tool", "content": "2"}, HO], (1, 3)),
}


@pytest.mark.parametrize("case", LEARNED)
def test_which_answers_are_learned(case):
    messages, learned = LEARNED[case]
    example = convert(*messages)
    assert example.learned == learned
    assert not any(key in message for message in example.messages for key in ("weight", "train", "loss"))


def call(**function) -> dict:
    return {"role": "assistant", "tool_calls": [{"function": function}]}


REJECTED = {
    "no role": ({"content": "x"}, r"a message is not \{role, content\} \(no role\)"),
    "no content": ({"role": "user"}, r"a message is not \{role, content\} \(no content\)"),
    "a user's null": ({"role": "user", "content": None}, r"no content"),
    "unknown role": ({"role": "narrator", "content": "x"}, r"unknown role \('narrator'\)"),
    "a role that is a number": ({"role": 1, "content": "x"}, r"unknown role \(1\)"),
    "two roles": ({"role": "user", "from": "gpt", "value": "x"}, "a message has two roles"),
    "two contents": (HI | {"value": "other"}, "both content and value"),
    "content an object": ({"role": "tool", "content": {"a": 1}}, "content is not text"),
    "an image": (
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}],
        },
        r"a part that is not text \(image_url\)",
    ),
    "audio": ({"role": "user", "content": [{"type": "input_audio"}]}, r"not text \(input_audio\)"),
    "a part without text": ({"role": "user", "content": [{"type": "text"}]}, "content is not text"),
    "half a surrogate pair": ({"role": "user", "content": "\ud800"}, "half a surrogate pair"),
    "half a surrogate pair in a part": ({"role": "user", "content": ["\ud800"]}, "half a surrogate pair"),
    "weight between": (HO | {"weight": 0.5}, r"weight of a message is neither 0 nor 1.*0\.5"),
    "weight a text": (HO | {"weight": "1"}, "weight of a message is neither"),
    "weight and train against each other": (HO | {"weight": 1, "train": False}, "both that it is learned and"),
    "a user's message to learn": (HI | {"train": True}, "not the assistant's is marked as one to learn"),
    "a part of an answer to learn": (HO | {"train_detail": [{"begin_offset": 0}]}, "train_detail is not supported"),
    "an empty answer": ({"role": "assistant", "content": " \n"}, "empty assistant message"),
    "arguments that are no JSON": (
        call(name="add", arguments="a=1"),
        "arguments of a tool call is text, but not JSON",
    ),
    "arguments that are a list": (call(name="add", arguments="[1]"), "arguments of a tool call are not an object"),
    "arguments and parameters": (call(name="add", arguments={}, parameters={}), "both arguments and parameters"),
    "a call of nothing": (call(arguments={}), "names no function"),
    "a call that is a number": ({"role": "assistant", "tool_calls": [1]}, "a tool call is not an object"),
    "two spellings of calls": (call(name="add") | {"function_call": ADD}, "spells its tool calls twice"),
    "function_call without JSON": ({"from": "function_call", "value": "add 1"}, "a tool call is text, but not JSON"),
    "function_call without a text": ({"from": "function_call"}, "a tool call is text, but not JSON"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_what_is_no_message_is_rejected(case):
    message, reason = REJECTED[case]
    with pytest.raises(Reject, match=reason):
        convert(HI, message, HO)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([HI], "no assistant message"),
        ([HI, HO | {"weight": 0}], "no answer is to be learned"),
        ([HI, HO | {"train": False}, HI], "no answer is to be learned"),
        ([HI, "ho"], r"a message is not \{role, content\} \(str\)"),
        ([], "messages is not a list of messages"),
    ],
)
def test_a_conversation_without_an_answer_to_learn_is_rejected(messages, reason):
    with pytest.raises(Reject, match=reason):
        convert(*messages)


WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for call in m.tool_calls or [] %}"
    "{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HISTORY = [["Good day", "Bad day"]]
ROWS = {
    "a call and its result": (
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                HI,
                {"role": "assistant", "content": None, "tool_calls": [{"function": WIRE}]},
                {"role": "tool", "content": "2"},
                HO,
                {"role": "user", "content": "Thanks"},
            ],
            "tools": json.dumps([{"name": "add"}]),
        },
        ['<call>{"name": "add", "arguments": {"a": 1}}</call><|im_end|>', "ho<|im_end|>"],
        ['Tools: [{"type": "function", "function": {"name": "add"}}]', "system\nBe brief.", "tool\n2"],
    ),
    "an answer of weight 0": ({"messages": [HI, HO | {"weight": 0}, HI, HO]}, ["ho<|im_end|>"], ["assistant\nho"]),
    "prompt and completion": ({"prompt": [HI, HO, HI], "completion": [HO]}, ["ho<|im_end|>"], ["assistant\nho"]),
    "history": (
        {"system": "Be kind.", "instruction": "Add", "input": "1 1", "output": "2", "history": HISTORY},
        ["2<|im_end|>"],
        ["system\nBe kind.", "user\nGood day", "assistant\nBad day", "user\nAdd\n\n1 1"],
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_what_is_learned_of_a_row_and_what_is_read(case):
    fields, learned, read = ROWS[case]
    tokenizer = byte_level("<|im_end|>", template=WITH_TOOLS)
    row = encode(to_example(Record(fields, "f:1"), detect_format(fields)), tokenizer, 512)
    assert learned_texts(row, tokenizer) == learned
    text = tokenizer.decode(row["input_ids"])
    assert all(f"{part}<|im_end|>" in text for part in read)
