"""`--columns`, `--chat_template` and `--chat_template_kwargs` from the flags to the rows."""

import json
from datetime import date

import pytest
from transformers import AutoTokenizer

from launch.common.errors import UserError
from launch.config.options import SftOptions
from launch.data.load import load_data
from launch.data.records import DataError
from tests.support.tokenizers import CHATML, byte_level

QUESTIONS = [{"id": n, "asked": f"{n} + 1?", "replied": str(n + 1), "source": "x"} for n in range(30)]
SETTING = CHATML.replace("{% for m", "{{ mood }}{% for m", 1)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def model(tmp_path):
    """A directory with a tokenizer, whose chat template is given."""

    def save(template: str | None) -> str:
        byte_level("<|im_end|>", template=template).save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
        return str(tmp_path / "model")

    return save


def first_row(**options) -> str:
    tokenizer, data = load_data(SftOptions(**options))
    return tokenizer.decode(data.train[0]["input_ids"])


def test_columns_are_renamed_and_the_others_named_once(tmp_path, model, capsys):
    source = write(tmp_path / "a.jsonl", QUESTIONS)
    columns = ["question=asked", "answer=replied"]
    text = first_row(data=source, columns=columns, model=model(None))
    assert text == "Question: 0 + 1?\nAnswer: 1<|im_end|>"
    assert capsys.readouterr().out.count("columns that play no part: id, source\n") == 1
    # the rows that were prepared for other names are not found again
    text = first_row(data=source, columns=["prompt=asked", "completion=replied"], model=model(None))
    assert text == "0 + 1?1<|im_end|>"


def test_a_tokenizer_is_trained_on_the_renamed_columns(tmp_path):
    source = write(tmp_path / "a.jsonl", QUESTIONS)
    text = first_row(data=source, columns=["question=asked", "answer=replied"], tokenizer_size=300)
    assert text == "<s>Question: 0 + 1?\nAnswer: 1</s>"


def test_columns_that_one_of_several_formats_uses_are_not_named(tmp_path, model, capsys):
    rows = [{"prompt": "a", "completion": "b", "answer": None}, {"question": "a", "answer": "b", "completion": None}]
    first_row(data=write(tmp_path / "a.jsonl", rows * 10), model=model(None))
    assert "play no part" not in capsys.readouterr().out


@pytest.mark.parametrize("columns", [["question=asked", "answer=reply"], ["answer=reply", "label=reply"]])
def test_a_column_that_no_row_has_ends_the_run(tmp_path, model, columns):
    source = write(tmp_path / "a.jsonl", QUESTIONS)
    with pytest.raises(DataError, match=r"--columns names 'reply'.* the columns are: asked, id, replied, source"):
        first_row(data=source, columns=columns, model=model(None))
    rows = [{"question": "a", "answer": "b"}]
    with pytest.raises(DataError, match=r"--columns names 'reply'.* the columns are: answer, question"):
        first_row(data=write(tmp_path / "a.jsonl", rows), columns=["other=reply"], model=model(None))


def test_a_column_that_is_renamed_away_no_longer_rejects_its_row(tmp_path, model):
    rows = [{"prompt": "a", "completion": "b", "context": "school"}]
    source = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="'context' changes what a row means"):
        first_row(data=source, model=model(None))
    assert first_row(data=source, columns=["other=context"], model=model(None)) == "ab<|im_end|>"


def test_a_question_is_a_conversation_unless_it_is_to_be_text(tmp_path, model):
    source, columns = write(tmp_path / "a.jsonl", QUESTIONS), ["question=asked", "answer=replied"]
    chat = "<|im_start|>user\n0 + 1?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>"
    assert first_row(data=source, columns=columns, model=model(CHATML)) == chat
    text = first_row(data=source, columns=columns, model=model(CHATML), chat_template="none")
    assert text == "Question: 0 + 1?\nAnswer: 1<|im_end|>"


@pytest.mark.parametrize("own", [None, CHATML])
def test_a_template_of_the_users_own_replaces_the_models_and_goes_with_it(tmp_path, model, own):
    source = write(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    template = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    file = tmp_path / "mine.jinja"
    file.write_text(template)
    tokenizer, data = load_data(SftOptions(data=source, model=model(own), chat_template=str(file)))
    assert tokenizer.decode(data.train[0]["input_ids"]) == "user:a<|im_end|>assistant:b<|im_end|>"
    tokenizer.save_pretrained(tmp_path / "exported")
    assert AutoTokenizer.from_pretrained(tmp_path / "exported").chat_template == template


def test_settings_reach_the_template_and_those_of_a_row_come_on_top(tmp_path, model):
    rows = [
        {"question": "a", "answer": "b"},
        {"question": "a", "answer": "b", "chat_template_kwargs": {"mood": "sad"}},
    ]
    source, settings = write(tmp_path / "a.jsonl", rows), {"mood": "glad"}
    tokenizer, data = load_data(SftOptions(data=source, model=model(SETTING), chat_template_kwargs=settings))
    starts = [tokenizer.decode(row["input_ids"]).partition("<")[0] for row in data.train]
    assert starts == ["glad", "sad"]
    assert first_row(data=source, model=model(SETTING)).startswith("<|im_start|>")


def test_settings_that_no_template_reads_are_refused(tmp_path, model):
    source = write(tmp_path / "a.jsonl", QUESTIONS)
    with pytest.raises(UserError, match="--chat_template_kwargs: the tokenizer has no chat template"):
        first_row(data=source, model=model(None), chat_template_kwargs={"mood": "glad"})
    with pytest.raises(UserError, match="--chat_template_kwargs: the chat template never reads 'moods'"):
        first_row(data=source, model=model(SETTING), chat_template_kwargs={"mood": "glad", "moods": "sad"})


def test_a_dated_template_is_told_one_day_and_prepared_again_for_another(tmp_path, model, capsys):
    dated = model("{{ strftime_now('%d %b %Y') + '\n' }}" + CHATML)
    options = SftOptions(data=write(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}]), model=dated)
    days = [date(2024, 2, 29), date(2024, 3, 1), date(2024, 2, 29)]
    starts = []
    for day in days:
        tokenizer, data = load_data(options, day)
        starts.append(tokenizer.decode(data.train[0]["input_ids"]).partition("\n")[0])
    assert starts == ["29 Feb 2024", "01 Mar 2024", "29 Feb 2024"]
    assert capsys.readouterr().out.count("from the cache") == 1


def test_an_undated_template_is_prepared_once(tmp_path, model, capsys):
    options = SftOptions(data=write(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}]), model=model(CHATML))
    for day in (date(2024, 2, 29), date(2024, 3, 1)):
        load_data(options, day)
    assert capsys.readouterr().out.count("from the cache") == 1


def test_an_end_of_turn_that_is_not_eos_is_named_and_becomes_a_stop(tmp_path, capsys):
    byte_level("<|endoftext|>").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    source = write(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}] * 2)
    tokenizer, data = load_data(SftOptions(data=source, model=str(tmp_path / "model")))
    note = "2 x the answer ends with <|im_end|>, where the tokenizer's EOS is <|endoftext|> (rows kept)"
    assert note in capsys.readouterr().out
    assert tokenizer.convert_ids_to_tokens(data.summary.stops) == ["<|im_end|>"]
