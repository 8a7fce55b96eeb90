"""From a row as people write it to the texts that are learned of it."""

import pytest

from launch.data.encode import encode
from launch.data.examples.formats import detect_format, to_example
from launch.data.records import Record
from tests.support.tokenizers import CHATML, byte_level, learned_texts

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello."}
MUL = {"name": "mul", "parameters": {}}
CALL = {"type": "function", "function": {"name": "mul", "arguments": {"a": 2, "b": 3}}}
WITH_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    + CHATML.replace(
        "(m.content or '')",
        "(m.content or '') + ('<call>' + m.tool_calls[0].function | tojson + '</call>' if m.tool_calls else '')",
    )
)
ROWS = {
    "two answers": (
        {"messages": [HI, HELLO, {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
        ["Hello.", "4"],
    ),
    "weight 0": (
        {"messages": [HI, HELLO | {"content": "bad", "weight": 0}, HI, HELLO | {"content": "good", "weight": 1}]},
        ["good"],
    ),
    "train: false": ({"messages": [HI, HELLO | {"train": False}, HI, HELLO | {"content": "good"}]}, ["good"]),
    "a last message from the user": ({"messages": [HI, HELLO, {"role": "user", "content": "thanks"}]}, ["Hello."]),
    "text parts": (
        {"messages": [HI, {"role": "assistant", "content": [{"type": "text", "text": "4"}]}]},
        ["4"],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        ["Hello."],
    ),
    "lists of messages as prompt and completion": ({"prompt": [HI, HELLO, HI], "completion": [HELLO]}, ["Hello."]),
    "Alpaca with system and history": (
        {"system": "Be terse.", "instruction": "add", "input": "1 1", "output": "2", "history": [["hi", "ho"]]},
        ["2"],
    ),
    "Dolly": ({"instruction": "add", "context": "1 1", "response": "2"}, ["2"]),
    "a question": ({"question": "2+2?", "answer": "4"}, ["4"]),
    "a call of a tool": (
        {
            "messages": [
                HI,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "6"},
                {"role": "assistant", "content": "It is 6."},
            ],
            "tools": [{"type": "function", "function": MUL}],
        },
        ['<call>{"name": "mul", "arguments": {"a": 2, "b": 3}}</call>', "It is 6."],
    ),
}


@pytest.mark.parametrize(("fields", "answers"), ROWS.values(), ids=ROWS)
def test_answers_and_their_stops_are_learned(fields, answers):
    tokenizer = byte_level("<|im_end|>", template=WITH_TOOLS)
    row = encode(to_example(Record(fields, "f:1"), detect_format(fields)), tokenizer, 512)
    assert learned_texts(row, tokenizer) == [f"{answer}<|im_end|>" for answer in answers]


def test_what_is_not_learned_is_written():
    tokenizer = byte_level("<|im_end|>", template=WITH_TOOLS)

    def text(name: str) -> str:
        fields = ROWS[name][0]
        example = to_example(Record(fields, "f:1"), detect_format(fields))
        return tokenizer.decode(encode(example, tokenizer, 512)["input_ids"])

    assert "Be terse." in text("Alpaca with system and history") and "ho<|im_end|>" in text(
        "Alpaca with system and history"
    )
    assert 'Tools: [{"type": "function", "function": {"name": "mul"' in text("a call of a tool")
    assert "bad<|im_end|>" in text("weight 0")
