"""What is learned of a conversation, by kinds of tokenizer and template: answers, their stops, and nothing else."""

from datetime import date

import pytest
from tokenizers import AddedToken, processors

from launch.common.errors import Reject
from launch.data.encode import Encoder, encode
from launch.data.examples.kinds import ChatExample, PairExample, TextExample
from launch.data.examples.render import row_time_limit
from launch.data.train_tokenizer import train_tokenizer
from tests.support.tokenizers import CHATML, byte_level, learned_texts, llama_2_like, without_offsets

HEADER = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
MARKED = "{%% if m.role == 'assistant' %%}{%% generation %%}%s{%% endgeneration %%}{%% else %%}%s{%% endif %%}"
TURN = "{{ m.content + '<|im_end|>\n' }}"
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "unmarked": CHATML,
    "marked up to the newline": HEADER + MARKED % (TURN, TURN) + "{% endfor %}" + OPEN,
    "stop outside the mark": HEADER
    + MARKED % ("{{ m.content }}", "{{ m.content }}")
    + "{{ '<|im_end|>\n' }}{% endfor %}"
    + OPEN,
    "marks that hold no stop and no newline": HEADER
    + MARKED % ("{{ m.content }}", "{{ m.content }}")
    + "{{ '<|im_end|>' }}{% endfor %}"
    + OPEN,
    "earlier thoughts are dropped": HEADER
    + "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    + TURN
    + "{% endfor %}"
    + OPEN,
    "a thought is opened": CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"),
    "a last token that goes": HEADER
    + TURN
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}"
    + "{% endif %}",
    "no generation prompt": HEADER + TURN + "{% endfor %}",
    "the system prompt moves to the last user turn": (
        "{% for m in messages %}{% set last = loop.index0 >= loop.length - 2 %}"
        "{{ '<|im_start|>' + m.role + '\n' + ('Be brief. ' if m.role == 'user' and last else '') + m.content }}"
        "{{ '<|im_end|>\n' }}{% endfor %}" + OPEN
    ),
}
TURNS = [("user", "Hi"), ("assistant", "Hello."), ("user", "2+2?"), ("assistant", "4"), ("user", "thanks")]


def chat(turns, learned=None, **template_kwargs) -> ChatExample:
    messages = [{"role": role, "content": content} for role, content in turns]
    answers = tuple(index for index, (role, _) in enumerate(turns) if role == "assistant")
    return ChatExample(messages, "f:1", answers if learned is None else learned, template_kwargs)


def stripped(row, tokenizer) -> list[str]:
    return [text.removeprefix("<think>\n\n</think>\n\n").rstrip() for text in learned_texts(row, tokenizer)]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("turns", [2, 3, 4, 5])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_every_answer_and_its_stop_once(template, turns, system, eos):
    tokenizer = byte_level(eos, template=template)
    turned = [*([("system", "Be kind.")] if system else []), *TURNS[:turns]]
    row = encode(chat(turned), tokenizer, 256)
    answers = [content + "<|im_end|>" for role, content in turned if role == "assistant"]
    assert stripped(row, tokenizer) == answers
    assert row["labels"][-1] != -100 and row["input_ids"].count(tokenizer.convert_tokens_to_ids(eos)) <= turns + 1
    whole = tokenizer.apply_chat_template(
        [dict(zip(("role", "content"), t, strict=True)) for t in turned], tokenize=False
    )
    assert whole.startswith(tokenizer.decode(row["input_ids"]))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("answer", ["1", " 4", "\n4", "<4", "user", "Hi", "Be kind.", "héé😀", "\tx = 1\n\ty"])
def test_answers_that_look_like_their_surroundings(template, answer):
    tokenizer = byte_level("<|im_end|>", template=template)
    turns = [("user", answer), ("assistant", answer), ("user", answer), ("assistant", answer)]
    assert stripped(encode(chat(turns), tokenizer, 256), tokenizer) == [f"{answer}<|im_end|>"] * 2


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("learned", [(1,), (3,)])
def test_an_answer_that_is_not_to_be_learned_is_context(template, learned):
    tokenizer = byte_level("<|im_end|>", template=template)
    row = encode(chat(TURNS, learned), tokenizer, 256)
    assert stripped(row, tokenizer) == [TURNS[learned[0]][1] + "<|im_end|>"]


def test_an_earlier_thought_is_no_part_of_what_is_learned():
    """Answers before the last are learned as the template writes them: without the thought of the last one."""
    tokenizer = byte_level("<|im_end|>", template=TEMPLATES["earlier thoughts are dropped"])
    texts = learned_texts(encode(chat(TURNS[:4]), tokenizer, 256), tokenizer)
    assert texts == ["Hello.<|im_end|>", "<think>\n\n</think>\n\n4<|im_end|>"]


def test_a_thought_that_answers_do_not_show_is_noted():
    tokenizer = byte_level("<|im_end|>", template=TEMPLATES["a thought is opened"])
    row = encode(chat(TURNS[:2]), tokenizer, 256)
    assert row["notes"] == ["the generation prompt opens with '<think>', which answers do not show"]


@pytest.mark.parametrize("make", [llama_2_like, without_offsets])
def test_no_seam_before_an_answer(make):
    """Tokens are those of the whole text: no dummy prefix makes a space in the middle of it."""
    tokenizer = make(ZEPHYR)
    row = encode(chat([("user", "hello"), ("assistant", "yes no")]), tokenizer, 256)
    whole = tokenizer("<|user|>\nhello</s>\n<|assistant|>\nyes no</s>\n", add_special_tokens=False)["input_ids"]
    assert row["input_ids"] == whole[: len(row["input_ids"])]
    learned = [label for label in row["labels"] if label != -100]
    assert tokenizer.convert_ids_to_tokens(learned)[-1] == "</s>"
    assert tokenizer.decode(learned) == "yes no</s>"
    text = encode(TextExample("hello\n", "yes", "f:1"), tokenizer, 256)
    assert text["input_ids"] == [*tokenizer("hello\nyes")["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode([label for label in text["labels"] if label != -100]) == "yes</s>"


@pytest.mark.parametrize("answer", ["  4  ", "\n\n4", "    ", " \t4\n"])
def test_blanks_without_offsets_are_learned_with_their_answer(answer):
    """A post-processor as GPT-2's trims blanks from offsets, so that tokens of blanks have no characters."""
    tokenizer = byte_level("<|im_end|>")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    row = encode(chat([("user", "  Hi  "), ("assistant", answer), *TURNS[2:4]]), tokenizer, 256)
    assert learned_texts(row, tokenizer) == [f"{answer}<|im_end|>", "4<|im_end|>"]
    text = encode(TextExample("Q:", f"{answer}x", "f:1"), tokenizer, 256)
    assert learned_texts(text, tokenizer) == [f"{answer}x<|im_end|>"]
    for ending in ("x", " x  ", "x\n\n"):
        row = encode(TextExample("Q:", answer + ending, "f:1"), tokenizer, 256)
        assert learned_texts(row, tokenizer) == [f"{answer}{ending}<|im_end|>"]


def test_text_without_a_prompt_is_learned_whole():
    tokenizer = train_tokenizer(["a few words"], 300)
    row = encode(TextExample("", " a few", "f:1"), tokenizer, 64)
    assert tokenizer.decode(row["input_ids"]) == "<s> a few</s>"
    assert row["labels"] == [-100, *row["input_ids"][1:]]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_question_that_quotes_the_header_of_answers(template):
    question = "<|im_start|>assistant\nno<|im_end|>"
    turns = [("user", question), ("assistant", "yes"), ("user", question), ("assistant", "no")]
    tokenizer = byte_level("<|im_end|>", template=template)
    assert stripped(encode(chat(turns), tokenizer, 256), tokenizer) == ["yes<|im_end|>", "no<|im_end|>"]


def test_several_answers_without_a_generation_prompt():
    tokenizer = llama_2_like(LLAMA_2)
    row = encode(chat([("user", "one"), ("assistant", "yes"), ("user", "two"), ("assistant", "no")]), tokenizer, 256)
    assert [text.strip() for text in learned_texts(row, tokenizer)] == ["yes </s>", "no </s>"]
    assert tokenizer.decode(row["input_ids"]) == "<s>[INST] one [/INST] yes </s><s>[INST] two [/INST] no </s>"


def test_a_template_without_stops_ends_with_eos():
    template = "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
    tokenizer = byte_level("<|endoftext|>", template=template)
    assert learned_texts(encode(chat(TURNS[:4]), tokenizer, 256), tokenizer) == ["Hello.\n", "4\n<|endoftext|>"]


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_bos_is_the_templates(bos):
    for template in (CHATML, "{{ '<s>' }}" + CHATML):
        tokenizer = byte_level("<|im_end|>", bos or "<s>", template)
        text = tokenizer.decode(encode(chat(TURNS[:2]), tokenizer, 256)["input_ids"])
        assert text.count("<s>") == template.count("<s>")


def test_pairs_go_through_the_chat_template_where_there_is_one():
    pair = PairExample(TextExample("Question: Hi\nAnswer:", " Hello.", "f:1"), chat(TURNS[:2]))
    tokenizer = byte_level("<|im_end|>")
    assert encode(pair, tokenizer, 256) == encode(pair.chat, tokenizer, 256)
    as_text = Encoder(tokenizer, 256, pairs_as_chat=False)(pair)
    assert as_text["input_ids"].tolist() == encode(pair.text, tokenizer, 256)["input_ids"]
    tokenizer.chat_template = None
    assert encode(pair, tokenizer, 256) == encode(pair.text, tokenizer, 256)


def test_a_dated_template_prints_the_day_that_it_is_given():
    tokenizer = byte_level("<|im_end|>", template="{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}" + CHATML)
    row = Encoder(tokenizer, 256, day=date(2024, 2, 29))(chat(TURNS[:2]))
    assert tokenizer.decode(row["input_ids"]).startswith("Today: 29 Feb 2024\n<|im_start|>user")
    today = tokenizer.decode(encode(chat(TURNS[:2]), tokenizer, 256)["input_ids"])
    assert date.today().strftime("Today: %d %b %Y") in today


def test_arguments_of_the_template_and_of_the_row():
    template = "{{ 'T' + tools[0].function.name if tools else '' }}{{ 'K' if kind else '' }}{{ name or '' }}" + CHATML
    tokenizer = byte_level("<|im_end|>", template=template)
    encoder = Encoder(tokenizer, 256, arguments={"kind": True, "name": "run"})
    example = chat(TURNS[:2], name="row", tools=[{"type": "function", "function": {"name": "f"}}])
    assert tokenizer.decode(encoder(example)["input_ids"]).startswith("TfKrow<|im_start|>")


def test_a_conversation_that_is_too_long_loses_whole_turns():
    tokenizer = byte_level("<|im_end|>")
    turns = [("system", "Be kind."), *TURNS[:4], ("user", "3+3?"), ("assistant", "6")]
    whole = encode(chat(turns), tokenizer, 256)
    kept = {}
    for max_length in range(len(whole["input_ids"]), 2, -1):
        try:
            row = encode(chat(turns), tokenizer, max_length)
        except Reject as reject:
            assert reject.reason == f"conversation longer than max_length {max_length}"
            continue
        assert len(row["input_ids"]) <= max_length
        assert len(row["input_ids"]) + row["prompt_tokens_cut"] == len(whole["input_ids"])
        kept[tokenizer.decode(row["input_ids"])] = learned_texts(row, tokenizer)
    system, turn = (
        "<|im_start|>system\nBe kind.<|im_end|>\n",
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>",
    )
    asked = [turn.format("Hi", "Hello."), turn.format("2+2?", "4"), turn.format("3+3?", "6")]
    assert list(kept) == [system + "\n".join(asked[first:]) for first in range(3)]
    assert list(kept.values()) == [["Hello.<|im_end|>", "4<|im_end|>", "6<|im_end|>"][first:] for first in range(3)]


def test_tools_calls_are_learned_and_their_results_are_not():
    template = CHATML.replace(
        "(m.content or '') +",
        "(m.content or '') + ('<call>' + m.tool_calls[0].function | tojson + '</call>' if m.tool_calls else '') +",
    )
    tokenizer = byte_level("<|im_end|>", template=template)
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "mul"}}]}
    messages = [{"role": "user", "content": "2*3?"}, call, {"role": "tool", "content": "6"}]
    example = ChatExample([*messages, {"role": "assistant", "content": "It is 6."}], "f:1", (1, 3))
    assert learned_texts(encode(example, tokenizer, 256), tokenizer) == [
        '<call>{"name": "mul"}</call><|im_end|>',
        "It is 6.<|im_end|>",
    ]


def test_a_template_that_does_not_end_loses_its_row():
    endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}"
    tokenizer = byte_level("<|im_end|>", template=endless + "{% endfor %}" + CHATML)
    with pytest.raises(Reject, match=r"takes longer than 0\.2 seconds"), row_time_limit(0.2):
        encode(chat(TURNS[:2]), tokenizer, 256)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not show where an answer begins"),
        (
            CHATML.replace("(m.content or '')", "(m.content if loop.last else m.content.replace('l', 'L'))"),
            "writes an answer's words differently",
        ),
        ("{{ messages | length }}", "does not show where an answer begins"),
        (HEADER + "{% generation %}{{ m.role }}{% endgeneration %}{{ m.content }}{% endfor %}", "marks"),
        (CHATML + "{% if false %}{% generation %}{% endgeneration %}{% endif %}", "marks no answer"),
    ],
)
def test_a_template_that_hides_the_answer_is_refused_with_a_way_out(template, reason):
    with pytest.raises(Reject, match=reason) as caught:
        encode(chat(TURNS[:4]), byte_level("<|im_end|>", template=template), 256)
    assert "generation %}" in str(caught.value)


def test_a_row_of_many_spaces_costs_no_more_than_its_row():
    with pytest.raises(Reject, match="longer than"):
        encode(TextExample("p", " " * (11 << 20), "f:1"), byte_level("<|im_end|>"), 256)


def test_calls_within_a_turn_whose_prompt_opens_a_thought():
    """As Qwen 3's: the last message shows an empty thought, an earlier call none, nor any words to look for."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + '</call>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n' }}{% endif %}"
    )
    tokenizer = byte_level("<|im_end|>", template=template)
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "mul"}}]}
    messages = [{"role": "user", "content": "2*3?"}, call, {"role": "tool", "content": "6"}]
    example = ChatExample([*messages, {"role": "assistant", "content": "It is 6."}], "f:1", (1, 3))
    texts = learned_texts(encode(example, tokenizer, 256), tokenizer)
    assert texts == ["<call>mul</call><|im_end|>", "</think>\n\nIt is 6.<|im_end|>"]


def test_calls_for_a_template_that_takes_openais_spelling_alone():
    """As DeepSeek V3's: arguments are text to be joined, and a message of calls has no content."""
    template = CHATML.replace(
        "(m.content or '')",
        "(m.tool_calls[0].function.name + m.tool_calls[0].function.arguments if m.content is none else m.content)",
    )
    tokenizer = byte_level("<|im_end|>", template=template)
    function = {"name": "mul", "arguments": {"a": 2}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    example = ChatExample([{"role": "user", "content": "2*3?"}, call], "f:1", (1,))
    assert learned_texts(encode(example, tokenizer, 256), tokenizer) == ['mul{"a": 2}<|im_end|>']


def test_variables_of_a_row_that_a_template_never_reads_are_refused():
    with pytest.raises(Reject, match="does not read documents"):
        encode(chat(TURNS[:2], documents=[{"title": "a", "text": "b"}]), byte_level("<|im_end|>"), 256)


def test_a_result_of_a_tool_within_the_turn_of_its_call():
    """As gpt-oss's without marks: the call, its result and the words after it are one turn."""
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ '[' + m.content + ']<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% else %}{{ '<|im_end|>\n' }}{% endif %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    function = {"type": "function", "function": {"name": "mul"}}
    call = {"role": "assistant", "content": "I see.", "tool_calls": [function]}
    messages = [{"role": "user", "content": "2*3?"}, call, {"role": "tool", "content": "six"}]
    example = ChatExample([*messages, {"role": "assistant", "content": "It is 6."}], "f:1", (1, 3))
    texts = learned_texts(encode(example, byte_level("<|im_end|>", template=template), 256), byte_level("<|im_end|>"))
    assert texts == ["I see.mul", "It is 6.<|im_end|>"]
    opened = template.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
    with pytest.raises(Reject, match="words of another role into an answer"):
        encode(example, byte_level("<|im_end|>", template=opened), 256)


def test_calls_of_one_tool_are_counted():
    template = CHATML.replace("(m.content or '')", "(m.tool_calls[0].function.name if m.tool_calls else m.content)")
    function = {"type": "function", "function": {"name": "mul"}}
    call = {"role": "assistant", "content": "", "tool_calls": [function, function]}
    with pytest.raises(Reject, match="does not write tool calls"):
        encode(
            ChatExample([{"role": "user", "content": "?"}, call], "f:1", (1,)),
            byte_level("<|im_end|>", template=template),
            99,
        )


@pytest.mark.parametrize("answer", ["yes<|im_end|>no", "yes<|im_end|>\n<|im_start|>user\nno"])
def test_an_answer_that_holds_an_end_of_turn_is_refused(answer):
    with pytest.raises(Reject, match="holds the end token before its end"):
        encode(chat([("user", "Hi"), ("assistant", answer)]), byte_level("<|endoftext|>"), 256)


def test_marks_that_hold_a_second_stop_or_the_header():
    end = "{{ '<|im_end|>\n' + ('<|endoftext|>' if loop.last else '') }}"
    template = HEADER + MARKED % ("{{ m.content }}" + end, TURN) + "{% endfor %}" + OPEN
    tokenizer = byte_level("<|endoftext|>", template=template)
    assert stripped(encode(chat(TURNS[:4]), tokenizer, 256), tokenizer) == ["Hello.<|im_end|>", "4<|im_end|>"]
    assert stripped(encode(chat(TURNS[:4], (1,)), tokenizer, 256), tokenizer) == ["Hello.<|im_end|>"]
    turn = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    template = "{% for m in messages %}" + MARKED % (turn, turn) + "{% endfor %}" + OPEN
    tokenizer = byte_level("<|im_end|>", template=template)
    assert learned_texts(encode(chat(TURNS[:4]), tokenizer, 256), tokenizer) == ["Hello.<|im_end|>", "4<|im_end|>"]


WRITES_CALLS = CHATML.replace(
    "(m.content or '')", "(m.content or '') + ('<call>' + m.tool_calls[0].function.name if m.tool_calls else '')"
)
SOMETIMES = CHATML.replace("(m.content or '')", "(m.content or m.tool_calls[0].function.name)")
WRITES_TOOLS = "{{ tools[0].function.name if tools and messages[0].role != 'system' }}" + CHATML


@pytest.mark.parametrize("name", ["mul", "m"])  # a word of the answer, a letter of <|im_start|>
def test_a_name_in_the_words_is_no_call_and_no_tool(name):
    tools = [{"type": "function", "function": {"name": name}}]
    asked = {"role": "user", "content": f"{name} 2 and 3"}
    called = {"role": "assistant", "content": f"I {name} them.", "tool_calls": tools}
    for template, writes in ((CHATML, False), (SOMETIMES, False), (WRITES_CALLS, True)):
        example = ChatExample([asked, called], "f:1", (1,))
        if writes:
            tokenizer = byte_level("<|im_end|>", template=template)
            texts = learned_texts(encode(example, tokenizer, 256), tokenizer)
            assert texts == [f"I {name} them.<call>{name}<|im_end|>"]
            continue
        with pytest.raises(Reject, match="does not write tool calls"):
            encode(example, byte_level("<|im_end|>", template=template), 256)
    answer = {"role": "assistant", "content": "6"}
    tokenizer = byte_level("<|im_end|>", template=WRITES_TOOLS)
    encode(ChatExample([asked, answer], "f:1", (1,), {"tools": tools}), tokenizer, 256)
    with pytest.raises(Reject, match="does not write tools"):
        system = {"role": "system", "content": "Be kind."}
        encode(ChatExample([system, asked, answer], "f:1", (2,), {"tools": tools}), tokenizer, 256)


def test_what_a_template_leaves_out_is_refused_or_noted():
    tokenizer = byte_level("<|im_end|>")
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "mul"}}]}
    example = ChatExample([{"role": "user", "content": "2*3?"}, call], "f:1", (1,))
    with pytest.raises(Reject, match=r"does not write tool calls.*--chat_template"):
        encode(example, tokenizer, 256)
    tools = [{"type": "function", "function": {"name": "mul"}}]
    with pytest.raises(Reject, match=r"does not write tools.*--chat_template"):
        encode(chat(TURNS[:2], tools=tools), tokenizer, 256)
    silent = byte_level(
        "<|im_end|>", template=CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")
    )
    row = encode(chat([("system", "Be kind."), *TURNS[:2]]), silent, 256)
    assert row["notes"] == ["the chat template leaves out or changes words of the role system"]
    thought = chat(TURNS[:2])
    thought.messages[1]["reasoning_content"] = "Let me see."
    notes = encode(thought, byte_level("<|im_end|>"), 256)["notes"]
    assert notes == ["the chat template leaves out thoughts (reasoning_content)"]
    named = chat(TURNS[:2])
    named.messages[0] |= {"name": "Ann", "mood": "sad"}
    notes = encode(named, byte_level("<|im_end|>", template=CHATML + "{{ '' if mood else '' }}"), 256)["notes"]
    assert notes == ["the chat template does not read name of messages"]


@pytest.mark.parametrize("answer", [" 4", "\n4"])
def test_blanks_that_a_special_token_takes_along_do_not_make_it_a_label(answer):
    """As Phi-3's: its special tokens swallow the blanks behind them."""
    tokenizer = byte_level(
        "<|im_end|>", template=CHATML.replace("\n' + (m", "<|open|>' + (m").replace("t\n'", "t<|open|>'")
    )
    tokenizer.add_tokens([AddedToken("<|open|>", rstrip=True, special=True)], special_tokens=True)
    row = encode(chat([("user", "Hi"), ("assistant", answer)]), tokenizer, 256)
    assert learned_texts(row, tokenizer) == ["4<|im_end|>"]


def test_a_special_token_behind_an_answer_that_takes_its_blanks_along():
    template = "{% for m in messages %}{{ '<|x|>' + m.role + '\n' + m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<|x|>assistant\n' }}{% endif %}"
    tokenizer = byte_level("<|im_end|>", template=template)
    tokenizer.add_tokens([AddedToken("<|x|>", lstrip=True, special=True)], special_tokens=True)
    row = encode(chat([("user", "Hi"), ("assistant", "Hello. "), *TURNS[2:4]]), tokenizer, 256)
    assert learned_texts(row, tokenizer) == ["Hello.", "4<|im_end|>"]


def test_a_template_that_always_opens_an_answer():
    """As Llama 3's first: the header of an answer ends every conversation."""
    tokenizer = byte_level("<|im_end|>", template=CHATML.replace("if add_generation_prompt", "if true"))
    assert stripped(encode(chat(TURNS[:4]), tokenizer, 256), tokenizer) == ["Hello.<|im_end|>", "4<|im_end|>"]


def test_the_stop_of_an_earlier_turn_differs_from_the_last_ones():
    """As gpt-oss's: an answer ends with one token while it is the last, with another once a turn follows."""
    template = CHATML.replace(
        "'<|im_end|>\n' }}{% endfor", "('<|endoftext|>' if loop.last else '<|im_end|>') }}{% endfor"
    )
    tokenizer = byte_level("<|endoftext|>", template=template)
    texts = learned_texts(encode(chat(TURNS[:4]), tokenizer, 256), tokenizer)
    assert texts == ["Hello.<|im_end|>", "4<|endoftext|>"]
