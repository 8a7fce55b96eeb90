"""Conversations: the template decides, and what it cannot decide is an error."""

import pytest

from launch.common.errors import Reject
from launch.data.encode import encode
from launch.data.examples.kinds import ChatExample
from launch.data.records import DataError
from launch.data.train_tokenizer import train_tokenizer
from tests.support.data import prepared

PLAIN = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ 'A:' + m.content + eos_token + '\n' }}"
    "{% else %}{{ m.role[0] + ':' + m.content + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)
MARKED = PLAIN.replace(
    "{{ 'A:' + m.content + eos_token + '\n' }}",
    "{{ 'A:' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{{ '\n' }}",
)
STOP_UNMARKED = PLAIN.replace(
    "{{ 'A:' + m.content + eos_token + '\n' }}",
    "{{ 'A:' }}{%- generation -%}{{ m.content }}{%- endgeneration -%}{{ eos_token + '\n' }}",
)
NO_STOP = PLAIN.replace(" + eos_token", "")
UNLIKE = "{{ messages | length }}{{ messages[-1].content | upper }}"
REFUSES = "{{ raise_exception('roles must alternate') }}"


def conversation(*turns: str) -> ChatExample:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    answers = tuple(index for index, turn in enumerate(turns) if turn[0] == "a")
    return ChatExample([{"role": roles[t[0]], "content": t[1:]} for t in turns], "f:1", answers)


ONE = conversation("sbe", "uhi", "aho")
TWO = conversation("u12", "a34", "u56", "a78")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["0123456789 hi ho be\n sua:A"] * 3, 300)


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def learned(row, tokenizer) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


@pytest.mark.parametrize("template", [PLAIN, MARKED, STOP_UNMARKED, NO_STOP])
def test_one_answer(tokenizer, template):
    tokenizer = with_template(tokenizer, template)
    row = encode(ONE, tokenizer, 64)
    text = tokenizer.decode(row["input_ids"])
    newline = "\n" if template == NO_STOP else ""
    assert text == f"<s>s:be\nu:hi\nA:ho{newline}</s>"
    assert learned(row, tokenizer) == f"ho{newline}</s>"


@pytest.mark.parametrize("template", [MARKED, {"default": MARKED, "tool_use": PLAIN}])
def test_several_answers_with_marks(tokenizer, template):
    tokenizer = with_template(tokenizer, template)
    row = encode(TWO, tokenizer, 64)
    assert tokenizer.decode(row["input_ids"]) == "<s>u:12\nA:34</s>\nu:56\nA:78</s>"
    assert learned(row, tokenizer) == "34</s>78</s>"
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1
    assert all(label in (-100, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_a_stop_outside_the_marks_is_learned_once(tokenizer):
    row = encode(TWO, with_template(tokenizer, STOP_UNMARKED), 64)
    assert tokenizer.decode(row["input_ids"]) == "<s>u:12\nA:34</s>\nu:56\nA:78</s>"
    assert learned(row, tokenizer).endswith("78</s>")
    assert row["labels"][-1] == tokenizer.eos_token_id


def test_several_answers_without_marks(tokenizer):
    row = encode(TWO, with_template(tokenizer, PLAIN), 64)
    assert tokenizer.decode(row["input_ids"]) == "<s>u:12\nA:34</s>\nu:56\nA:78</s>"
    assert learned(row, tokenizer) == "34</s>78</s>"


def test_templates_of_which_none_is_the_default(tokenizer):
    tokenizer = with_template(tokenizer, {"tool_use": PLAIN, "rag": PLAIN})
    for example in (ONE, TWO):
        with pytest.raises(Reject, match="no default chat template"):
            encode(example, tokenizer, 64)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("turns", [("u1", "a2</s>3"), ("u1", "a2</s>3", "u4", "a5")])
def test_an_answer_that_holds_its_end_before_its_end(tokenizer, template, turns):
    with pytest.raises(Reject, match="holds the end token before its end"):
        encode(conversation(*turns), with_template(tokenizer, template), 64)


def test_no_template_is_an_error(tokenizer):
    with pytest.raises(DataError, match="chat template"):
        encode(ONE, with_template(tokenizer, None), 64)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (UNLIKE, "the chat template does not show where an answer begins and ends"),
        (REFUSES, "the chat template refuses the conversation"),
    ],
)
def test_a_conversation_that_the_template_cannot_render_is_rejected(tokenizer, template, reason):
    with pytest.raises(Reject) as caught:
        encode(ONE, with_template(tokenizer, template), 64)
    assert caught.value.reason == reason


def test_chat_file(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
        '{"messages": [{"role": "user", "content": "hi"}]}\n'
    )
    encoded = prepared(str(path), with_template(tokenizer, PLAIN), 64)
    assert (len(encoded.train), encoded.summary.formats) == (1, {"messages": 1})
    assert encoded.report.rejections[0].where == f"{path}:2"


RAISES = {
    "a type": "{{ 1 + 'a' }}",
    "an undefined field": "{{ messages[0].name.first }}",
    "arithmetic": "{{ 1 // 0 }}",
    "a key": "{{ {}['a'] + 1 }}",
    "an index": "{{ messages[9].role }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "a value": "{{ 'a' | int(base=99) }}{{ strftime_now(3) }}",
    "syntax": "{% if %}",
    "half a surrogate pair": "{{ '\\ud800' }}{{ messages[-1].content }}",
}


@pytest.mark.parametrize("template", RAISES.values(), ids=RAISES)
@pytest.mark.parametrize("marked", [False, True])
def test_whatever_a_template_raises_costs_its_row(tokenizer, template, marked):
    example = TWO if marked else ONE
    template += "{% generation %}{% endgeneration %}" if marked else ""
    with pytest.raises(Reject, match=r"chat template refuses|half a surrogate pair"):
        encode(example, with_template(tokenizer, template), 64)


def test_a_field_that_no_tokenizer_takes_costs_its_row(tokenizer):
    """JSON can spell half a surrogate pair, and a template may show any field of a message."""
    named = PLAIN.replace("m.content", "m.content + (m.name or '')")
    example = ChatExample([{"role": "user", "content": "hi", "name": "\ud800"}, *ONE.messages[-1:]], "f:1", (1,))
    for template in (named, named.replace("{{ 'A:'", "{% generation %}{% endgeneration %}{{ 'A:'")):
        with pytest.raises(Reject, match=r"half a surrogate pair|refuses the conversation"):
            encode(example, with_template(tokenizer, template), 64)
