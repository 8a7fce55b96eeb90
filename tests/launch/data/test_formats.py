"""What each format of a record becomes, what is rejected rather than left out, and what columns play no part."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.common.errors import Reject
from launch.data.examples.columns import Columns
from launch.data.examples.formats import (
    FORMATS,
    MEANINGFUL,
    detect_format,
    to_example,
    unused_fields,
    used_fields,
)
from launch.data.examples.kinds import ChatExample, Example, PairExample, TextExample, TokenExample
from launch.data.records import Record

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "guide.md"
ROLES = {"s": "system", "u": "user", "a": "assistant"}


def turns(*texts: str) -> list[dict]:
    """Messages of which the first letter is the role."""
    return [{"role": ROLES[text[0]], "content": text[1:]} for text in texts]


def chat(*texts: str, learned: tuple[int, ...] | None = None, **kwargs) -> ChatExample:
    return ChatExample(turns(*texts), "f:1", learned or (len(texts) - 1,), kwargs)


def pair(prompt: str, completion: str, conversation: ChatExample) -> PairExample:
    return PairExample(TextExample(prompt, completion, "f:1"), conversation)


def convert(fields: dict) -> Example:
    format = detect_format(fields)
    assert format, f"no format has {list(fields)}"
    return to_example(Record(fields, "f:1"), format)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
ASKED, SHARED = turns("uhi", "aho"), [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
# format, fields, example
RECOGNISED: dict[str, tuple[str, dict, Example]] = {
    "prompt/completion": ("prompt/completion", {"prompt": "p", "completion": "c"}, TextExample("p", "c", "f:1")),
    "prompt/completion, both as messages": (
        "prompt/completion",
        {"prompt": turns("sbe", "u1", "a2", "u3"), "completion": turns("a4", "u5", "a6")},
        chat("sbe", "u1", "a2", "u3", "a4", "u5", "a6", learned=(4, 6)),
    ),
    "a prompt of messages": (
        "prompt/completion",
        {"prompt": turns("uhi"), "completion": "ho", "tools": [TOOL]},
        chat("uhi", "aho", tools=[TOOL]),
    ),
    "a completion of messages": (
        "prompt/completion",
        {"prompt": "hi", "completion": turns("aho")},
        chat("uhi", "aho"),
    ),
    "a completion of messages without a prompt": (
        "prompt/completion",
        {"prompt": "", "completion": turns("aho")},
        chat("aho"),
    ),
    "a completion that is marked as a good one": (
        "prompt/completion",
        {"prompt": "p", "completion": "c", "label": True},
        TextExample("p", "c", "f:1"),
    ),
    "a completion that a table of text marks as a good one": (
        "prompt/completion",
        {"prompt": "p", "completion": "c", "label": "True"},
        TextExample("p", "c", "f:1"),
    ),
    "a completion that is marked by number": (
        "prompt/completion",
        {"prompt": "p", "completion": "c", "label": 1},
        TextExample("p", "c", "f:1"),
    ),
    "messages": ("messages", {"messages": ASKED}, chat("uhi", "aho")),
    "messages as JSON text": ("messages", {"messages": json.dumps(ASKED)}, chat("uhi", "aho")),
    "messages as JSON text with nulls": (
        "messages",
        {"messages": json.dumps([message | {"weight": None, "name": None} for message in ASKED])},
        chat("uhi", "aho"),
    ),
    "messages with their system prompt in a column too": (
        "messages",
        {"messages": turns("sbe", "uhi", "aho"), "system": "be"},
        chat("sbe", "uhi", "aho"),
    ),
    "messages with a system prompt": ("messages", {"messages": ASKED, "system": "be"}, chat("sbe", "uhi", "aho")),
    "ShareGPT": ("ShareGPT", {"conversations": SHARED}, chat("uhi", "aho")),
    "ShareGPT, its system prompt in a column": (
        "ShareGPT",
        {"conversations": SHARED, "system": "be", "tools": "[]"},
        chat("sbe", "uhi", "aho"),
    ),
    "conversation": ("ShareGPT (conversation)", {"conversation": SHARED}, chat("uhi", "aho")),
    "text": ("text", {"text": "all of it"}, TextExample("", "all of it", "f:1")),
    "question/answer": (
        "question/answer",
        {"question": "q?", "answer": "a"},
        pair("Question: q?\nAnswer:", " a", chat("uq?", "aa")),
    ),
    "question/answer with all that may stand before": (
        "question/answer",
        {"question": "q?", "answer": "a", "context": "c", "system_prompt": "be", "history": [["1", "2"], ["3", "4"]]},
        pair(
            "be\n\nQuestion: 1\nAnswer: 2\n\nQuestion: 3\nAnswer: 4\n\nContext: c\nQuestion: q?\nAnswer:",
            " a",
            chat("sbe", "u1", "a2", "u3", "a4", "uc\n\nq?", "aa"),
        ),
    ),
    "question/answer with tools": (
        "question/answer",
        {"question": "q?", "answer": "a", "tools": [TOOL]},
        chat("uq?", "aa", tools=[TOOL]),
    ),
    "question/answer with settings of the template": (
        "question/answer",
        {"question": "q?", "answer": "a", "chat_template_kwargs": {"enable_thinking": False}},
        pair("Question: q?\nAnswer:", " a", chat("uq?", "aa", enable_thinking=False)),
    ),
    "Alpaca": (
        "instruction/input/output",
        {"instruction": "do {input}", "output": "done"},
        pair("Instruction: do {input}\nResponse:", " done", chat("udo {input}", "adone")),
    ),
    "Alpaca with an input that is empty": (
        "instruction/input/output",
        {"instruction": "do", "input": " ", "output": "done", "text": "the same, written out"},
        pair("Instruction: do\nResponse:", " done", chat("udo", "adone")),
    ),
    "Alpaca with an input that is null": (
        "instruction/input/output",
        {"instruction": "do", "input": None, "output": "done", "history": []},
        pair("Instruction: do\nResponse:", " done", chat("udo", "adone")),
    ),
    "Alpaca with input, system prompt and history": (
        "instruction/input/output",
        {"instruction": "do", "input": "this", "output": "done", "system": "be", "history": '[["hi", "ho"]]'},
        pair(
            "be\n\nInstruction: hi\nResponse: ho\n\nInstruction: do\nInput: this\nResponse:",
            " done",
            chat("sbe", "uhi", "aho", "udo\n\nthis", "adone"),
        ),
    ),
    "Dolly": (
        "instruction/context/response",
        {"instruction": "do", "context": "this", "response": "done", "category": "x"},
        pair("Instruction: do\nInput: this\nResponse:", " done", chat("udo\n\nthis", "adone")),
    ),
    "already tokenised": (
        "already tokenised",
        {"input_ids": [1, 2], "labels": [-100, 2], "messages": ASKED},
        TokenExample([1, 2], [-100, 2], "f:1"),
    ),
    "already tokenised, with what says nothing new": (
        "already tokenised",
        {
            "input_ids": [1, 2, 3],
            "labels": [-100, 2, -100],
            "attention_mask": [1, 1, 1],
            "position_ids": [0, 1, 2],
            "token_type_ids": [0, 0, 0],
            "seq_lengths": [3],
            "completion_mask": [0, 1, 0],
        },
        TokenExample([1, 2, 3], [-100, 2, -100], "f:1"),
    ),
    **{
        f"token ids with {name}": (
            f"token ids with {name}",
            {"input_ids": [1, 2, 3], name: [0, 1, 1], "labels": None},
            TokenExample([1, 2, 3], [-100, 2, 3], "f:1"),
        )
        for name in ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask")
    },
    "token ids with two masks": (
        "token ids with completion_mask",
        {"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1], "assistant_masks": [True, True, False]},
        TokenExample([1, 2, 3], [-100, 2, -100], "f:1"),
    ),
}


@pytest.mark.parametrize("case", RECOGNISED)
def test_format_is_recognised_beside_other_fields(case):
    format, fields, example = RECOGNISED[case]
    fields = fields | {"id": 7, "source": "x"}
    assert detect_format(fields) == format
    assert to_example(Record(fields, "f:1"), format) == example


def test_every_format_that_gives_examples_is_tested():
    refused = {name for name, format in FORMATS.items() if format.learned.startswith("nothing")}
    assert {format for format, _, _ in RECOGNISED.values()} | refused == set(FORMATS)


PAIR, QA = {"prompt": "p", "completion": "c"}, {"question": "q", "answer": "a"}
IDS = {"input_ids": [1, 2, 3]}
LABELLED = IDS | {"labels": [-100, 2, 3]}
REJECTED = {
    "tools beside texts": (PAIR | {"tools": [TOOL]}, "'tools' belongs to a conversation.*--columns question=prompt"),
    "a system prompt beside texts": (PAIR | {"system": "be"}, "'system' belongs to a conversation"),
    "a context beside texts": (
        PAIR | {"context": "c"},
        "'context' changes what a row means.*--columns other=context",
    ),
    "a history beside messages": ({"messages": ASKED, "history": [["1", "2"]]}, "'history' changes"),
    "an image": ({"messages": ASKED, "images": ["a.png"]}, "'images' changes"),
    "tools beside a text": ({"text": "t", "tools": [TOOL]}, "'tools' changes"),
    "a row's weight": (QA | {"weight": 0.5}, "'weight' changes"),
    "a row's weight beside token ids": (LABELLED | {"weight": 0}, "'weight' changes"),
    "a mask without token ids": (QA | {"completion_mask": [0, 1]}, "'completion_mask' says which.*no input_ids"),
    "a bad completion": (PAIR | {"label": False}, "label is false"),
    "a bad completion in a table of text": (PAIR | {"label": "False"}, "label is false"),
    "a bad completion by number": (PAIR | {"label": 0}, "label is false"),
    "a label of something else": (
        PAIR | {"label": "sums"},
        r"label is neither true nor false.*--columns other=label",
    ),
    "a label that is a list": (PAIR | {"label": [0]}, "label is neither true nor false"),
    "two system prompts": (QA | {"system": "a", "system_prompt": "b"}, "both system and system_prompt"),
    "system prompt and system message": (
        {"messages": turns("sa", "ub", "ac"), "system": "b"},
        "a system field and another",
    ),
    "input and context": (
        {"instruction": "i", "output": "o", "input": "a", "context": "b"},
        "both input and context",
    ),
    "tools and functions": (QA | {"tools": [TOOL], "functions": [TOOL]}, "both tools and functions"),
    "a context that is no text": (QA | {"context": {"title": "t"}}, "context is not text"),
    "a history of messages": (QA | {"history": ASKED}, "history is not a list of"),
    "a history of threes": (QA | {"history": [["a", "b", "c"]]}, "history is not a list of"),
    "a history that is no list": (QA | {"history": {"a": 1}}, "history is not a list of"),
    "an empty text": ({"text": " "}, "empty text"),
    "a prompt that ends with an answer": (
        {"prompt": turns("ua", "ab"), "completion": "c"},
        "the prompt ends with a message of the assistant",
    ),
    "a completion without an answer": ({"prompt": "a", "completion": turns("ub")}, "no assistant message"),
    "attention_mask with zeros": (LABELLED | {"attention_mask": [1, 1, 0]}, "attention_mask hides tokens"),
    "attention_mask of another length": (LABELLED | {"attention_mask": [1, 1]}, "differ in length"),
    "attention_mask of numbers": (LABELLED | {"attention_mask": [1, 2, 1]}, "not a list of 0 and 1"),
    "positions of a packed row": (LABELLED | {"position_ids": [0, 1, 0]}, "position_ids do not count from 0"),
    "lengths of a packed row": (LABELLED | {"seq_lengths": [2, 1]}, "packed"),
    "token types": (LABELLED | {"token_type_ids": [0, 1, 1]}, "token_type_ids other than 0"),
    "labels against mask": (LABELLED | {"loss_mask": [0, 1, 0]}, "labels and mask disagree"),
    "a mask that is longer": (IDS | {"loss_mask": [0, 1, 0, 0]}, "loss_mask and input_ids differ in length"),
    "a mask that is no list": (IDS | {"loss_mask": "011"}, "loss_mask is not a list of 0 and 1"),
    "token ids alone": (IDS, "input_ids without labels.*labels=input_ids"),
    "tools that are no list": (QA | {"tools": "add"}, "tools is text, but not JSON"),
    "tools as JSON text and more": (QA | {"tools": "[] []"}, r"tools is text, but not JSON .*extra data, column 3"),
    "tools as JSON text with a key twice": (QA | {"tools": '[{"a": 1, "a": 2}]'}, r"not JSON .*duplicate keys"),
    "tools as JSON text with a NaN": (QA | {"tools": '[{"a": NaN}]'}, r"not JSON .*NaN is not JSON"),
    "tools that are an object": (QA | {"tools": {"name": "add"}}, "tools is not a list"),
    "a tool that is a number": (QA | {"tools": [1]}, "a tool is not an object"),
    "a tool without a name": (
        QA | {"tools": [{"type": "function", "function": {"x": 1}}]},
        "a tool names no function",
    ),
    "documents of texts": (QA | {"documents": ["a"]}, "documents is not a list of objects"),
    "kwargs that are a list": (QA | {"chat_template_kwargs": [1]}, "chat_template_kwargs is not an object"),
    "kwargs with a template": (QA | {"chat_template_kwargs": {"chat_template": "x"}}, "not the template's own"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_what_cannot_be_used_is_rejected_with_the_reason(case):
    fields, reason = REJECTED[case]
    with pytest.raises(Reject, match=reason):
        convert(fields)


@pytest.mark.parametrize(
    ("fields", "renamed"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "completion=chosen"),
        ({"prompt": "p", "chosen": turns("ac"), "rejected": turns("ar")}, "completion=chosen"),
        ({"prompt": "p", "chosen": turns("up", "ac"), "rejected": turns("up", "ar")}, "messages=chosen"),
        ({"chosen": SHARED, "rejected": SHARED}, "messages=chosen"),
        ({"question": "p", "chosen": "c", "rejected": "r"}, "answer=chosen"),
        ({"instruction": "p", "chosen": "c", "rejected": "r"}, "output=chosen"),
        ({"chosen": "c", "rejected": "r"}, "text=chosen"),
    ],
)
def test_a_preference_is_rejected_with_columns_that_work(fields, renamed):
    with pytest.raises(Reject, match=f"--columns {renamed}$"):
        convert(fields)
    name, column = renamed.split("=")
    convert(dict(Columns({name: column}).rename(fields)))


ONE_OF_EACH = (PAIR, QA, {"messages": ASKED}, {"text": "t"}, {"instruction": "a", "output": "b"})


@pytest.mark.parametrize("name", MEANINGFUL)
def test_what_holds_nothing_changes_nothing(name):
    for fields in (*ONE_OF_EACH, LABELLED):
        for value in (None, "", " ", [], {}, "[]", "{}", "null", {"name": None}, float("nan")):
            assert convert(fields | {name: value}) == convert(fields)


@pytest.mark.parametrize("name", MEANINGFUL)
def test_a_field_with_a_meaning_is_used_or_its_row_rejected(name):
    """Whatever a format does with it, the example is another one than without it."""
    values = {"weight": 0, "history": [["1", "2"]], "documents": [{"text": "d"}], "chat_template_kwargs": {"a": 1}}
    value = values.get(name, [TOOL] if name in ("tools", "functions") else "x")
    for fields in ONE_OF_EACH:
        with suppress(Reject):
            assert convert(fields | {name: value}) != convert(fields)


def test_tools_are_framed_as_templates_expect():
    bare = {"name": "add", "parameters": {"type": "object"}}
    flat = {"type": "function", **bare}
    nulls = {"type": "function", "function": bare | {"strict": None, "parameters": {"type": "object", "enum": None}}}
    other = {"type": "code_interpreter", "name": "python"}
    for tools in ([bare], [flat], [nulls], json.dumps([bare]), [json.dumps(TOOL)], [TOOL]):
        assert convert(QA | {"tools": tools}).template_kwargs == {"tools": [TOOL]}
        assert convert(QA | {"functions": tools}).template_kwargs == {"tools": [TOOL]}
    assert convert(QA | {"tools": [other]}).template_kwargs == {"tools": [other]}


def test_nulls_that_a_json_text_holds_are_kept():
    schema = {"type": "function", "function": {"name": "add", "default": None}}
    assert convert(QA | {"tools": json.dumps([schema])}).template_kwargs["tools"] == [schema]


def test_documents_and_settings_reach_the_template():
    fields = {
        "messages": ASKED,
        "documents": [{"title": "t", "text": "d"}],
        "chat_template_kwargs": '{"thinking": true}',
    }
    assert convert(fields).template_kwargs == {"documents": [{"title": "t", "text": "d"}], "thinking": True}


def test_null_columns_do_not_decide_the_format():
    fields = {"messages": None, "prompt": "p", "completion": "c", "input_ids": None, "labels": None}
    assert detect_format(fields) == "prompt/completion"


def test_empty_lists_do_not_decide_the_format():
    assert detect_format({"messages": [], "conversations": [], "question": "q", "answer": "a"}) == "question/answer"
    assert detect_format({"messages": []}) == "messages"


def test_a_missing_field_is_named():
    with pytest.raises(Reject, match="no field 'completion'"):
        to_example(Record({"prompt": "p"}, "f:1"), "prompt/completion")


def test_columns_that_play_no_part():
    names = ["question", "answer", "context", "id", "source"]
    assert unused_fields(names, "question/answer") == {"id", "source"}
    assert unused_fields(["text", "tools", "weight", "id"], "text") == {"id"}  # its tools would have been rejected
    for name, format in FORMATS.items():
        assert {*format.needs, *format.may} <= used_fields(name)


def test_columns_are_renamed():
    columns = Columns({"prompt": "question", "completion": "answer"})
    fields = {"id": 1, "question": "q", "answer": "a", "completion": "old"}
    assert dict(columns.rename(fields)) == {"id": 1, "prompt": "q", "completion": "a"}
    assert unused_fields(fields, "prompt/completion", columns) == {"id", "completion"}
    assert columns.rename({"text": "t"}) == {"text": "t"}
    swapped = Columns({"question": "answer", "answer": "question"})
    assert dict(swapped.rename({"question": "a", "answer": "q"})) == {"question": "q", "answer": "a"}
    assert unused_fields(["question", "answer"], "question/answer", swapped) == set()
    twice = Columns({"input_ids": "input_ids", "labels": "input_ids"})
    assert convert(dict(twice.rename(IDS))) == TokenExample([1, 2, 3], [1, 2, 3], "f:1")
    assert unused_fields(IDS, "already tokenised", twice) == set()
    away = Columns({"other": "context"})
    assert convert(dict(away.rename(PAIR | {"context": "c"}))) == TextExample("p", "c", "f:1")
    assert unused_fields([*PAIR, "context"], "prompt/completion", away) == {"context"}


def test_a_column_that_is_not_asked_for_is_not_read():
    class Late(dict):
        def __getitem__(self, name):
            assert name != "when", "read"
            return super().__getitem__(name)

        get = __getitem__

    renamed = Columns({"prompt": "question"}).rename(Late(question="q", answer="a", when="9999"))
    assert "when" in renamed and len(renamed) == 3 and renamed["prompt"] == "q"


def test_a_column_that_no_row_has_is_named():
    columns = Columns({"prompt": "question", "completion": "reply"})
    assert columns.problem({"question", "reply", "id"}) is None
    problem = columns.problem({"question", "answer", "id"})
    assert problem == "--columns names 'reply', which no row of the data has; the columns are: answer, id, question"


def test_the_guide_has_the_table_of_formats():
    rows = [line for line in GUIDE.read_text().splitlines() if line.startswith("|")]
    for name, format in FORMATS.items():
        needs, may = (", ".join(f"`{field}`" for field in names) for names in (format.needs, format.may))
        assert f"| {name} | {needs} | {may} | {format.learned} |" in rows


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["[]", '{"a": 1}']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FUNCTIONS = st.dictionaries(st.sampled_from(["name", "arguments", "parameters", "x"]), anything | st.just("add"))
CALLS = st.fixed_dictionaries({}, optional={"function": anything | FUNCTIONS, "type": anything, "id": anything})
MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": anything | st.sampled_from(["user", "assistant", "tool", "function_call"]),
        "from": anything | st.sampled_from(["human", "gpt"]),
        "content": anything | st.text(max_size=8) | st.lists(st.just({"type": "text", "text": "a"}), max_size=2),
        "value": anything,
        "weight": anything | st.sampled_from([0, 1]),
        "train": anything,
        "tool_calls": anything | st.lists(CALLS | FUNCTIONS, max_size=2),
        "function_call": anything | FUNCTIONS,
    },
)
NAMES = sorted({name for format in FORMATS for name in used_fields(format)})
IDS_OF_SOME_KIND = st.lists(st.integers(-101, 9), max_size=4)
ROWS = st.dictionaries(
    st.sampled_from(NAMES), anything | st.lists(MESSAGES, max_size=3) | IDS_OF_SOME_KIND | st.lists(CALLS), max_size=5
)


@settings(max_examples=200, deadline=None)
@given(ROWS, st.sampled_from(list(FORMATS)))
def test_no_value_makes_it_raise_anything_but_a_reject(fields, format):
    """An example holds what an encoder relies on."""
    try:
        example = to_example(Record(fields, "f:1"), detect_format(fields) or format)
    except Reject as reject:
        assert reject.reason
        return
    if isinstance(example, TokenExample):
        assert all(type(token) is int for token in [*example.input_ids, *example.labels])
        return
    chat_example = example.chat if isinstance(example, PairExample) else example
    if isinstance(chat_example, ChatExample):
        assert chat_example.learned
        for index, message in enumerate(chat_example.messages):
            assert isinstance(message["content"], str) and message["role"] in ("system", "user", "assistant", "tool")
            assert index not in chat_example.learned or message["role"] == "assistant"
            assert None not in message.values()


def test_a_value_that_is_nested_too_deeply_is_rejected():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for name in ("messages", "conversations"):
        with pytest.raises(Reject, match="nested too deeply"):
            convert({name: deep})
    with pytest.raises(Reject, match=r"messages is text, but not JSON .*nested too deeply"):
        convert({"messages": "[" * 100_000})
