"""Splits, notes, what is said of an example, and batches."""

import json
from types import SimpleNamespace

import datasets
import pytest
import torch

from launch.common.errors import Reject
from launch.config.options import SftOptions
from launch.data.batches import PadToLongest
from launch.data.blank_rows import fill_to_multiple
from launch.data.examples.kinds import TextExample
from launch.data.examples.rows import IGNORED
from launch.data.examples.special_tokens import SpelledOut
from launch.data.load import describe_example, describe_formats, load_data
from launch.data.prepare import draw_heldout
from launch.data.read import sources_of
from launch.data.records import DataError, DropReport
from launch.data.rows_file import COLUMNS
from launch.data.train_tokenizer import train_tokenizer
from tests.support.data import prepared


def write(path, count, start=0):
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["0 1 2 3 4 5 6 7 8 9 + ="], 300)


def test_heldout_rows_are_a_seeded_fraction(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", 100)
    first, again, other = (prepared(source, tokenizer, seed=seed) for seed in (1, 1, 2))
    assert (len(first.train), len(first.heldout)) == (95, 5)
    assert first.heldout[:] == again.heldout[:] and first.train[:] == again.train[:]
    assert first.heldout["where"][:] != other.heldout["where"][:]
    lines = [int(where.rpartition(":")[2]) for where in first.train["where"]]
    held = [int(where.rpartition(":")[2]) for where in first.heldout["where"]]
    assert lines == sorted(lines) and held == sorted(held) and sorted(lines + held) == list(range(1, 101))


@pytest.mark.parametrize(("count", "heldout"), [(1, 0), (19, 0), (20, 1), (21, 1), (60, 3)])
def test_small_data_holds_nothing_out_and_says_so(tmp_path, tokenizer, count, heldout):
    data = prepared(write(tmp_path / "a.jsonl", count), tokenizer)
    assert (len(data.train), len(data.heldout)) == (count - heldout, heldout)
    assert bool(heldout) != any("nothing held out" in note for note in data.report.left_out)


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.001, 1), (0.5, 50), (0.999, 99)])
def test_a_split_leaves_a_row_on_each_side(fraction, count):
    assert len(draw_heldout(100, fraction, 0)) == count


def test_eval_source_is_all_held_out(tmp_path):
    source, other = write(tmp_path / "a.jsonl", 30), write(tmp_path / "b.jsonl", 7, start=90)
    _, data = load_data(SftOptions(data=source, eval_data=other, tokenizer_size=300))
    assert (len(data.train), len(data.heldout)) == (30, 7)
    assert data.heldout["where"][0] == f"{other}:1"


def test_eval_source_without_usable_rows_is_an_error(tmp_path, tokenizer):
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "completion": ""}')
    with pytest.raises(DataError, match=r"held-out.*\n.*\n.*empty completion"):
        prepared(write(tmp_path / "a.jsonl", 3), tokenizer, eval_source=str(tmp_path / "b.jsonl"))


@pytest.mark.parametrize("fraction", [-0.1, 1, float("nan")])
def test_eval_fraction_out_of_range_is_an_error(fraction):
    with pytest.raises(DataError, match="eval_fraction"):
        sources_of(["a.jsonl"], None, fraction)


def test_what_is_no_special_token_is_not_said():
    tokenizer = train_tokenizer(["a b c"] * 3, 300)
    tokenizer.add_tokens(["<plain>"])
    tokenizer.add_tokens(["<s>2"], special_tokens=True)
    find = SpelledOut(tokenizer)
    assert find.first(TextExample("a<plain>", "b", "f:1")) is None
    assert find.first(TextExample("a<s>2", "b", "f:1")) == "<s>2"  # not "<s>"
    bare = SimpleNamespace(added_tokens_decoder={}, bos_token=None, eos_token="</s>")
    assert SpelledOut(bare).first(TextExample("a</s>", "b", "f:1")) is None


def test_every_dropped_row_is_a_line(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"prompt": "{n}", "completion": "{n if n % 2 else ""}"}}\n' for n in range(60)))
    report = prepared(str(path), tokenizer).report
    assert report.summary().startswith("30 rows dropped\n")
    assert report.lines().splitlines() == [f"{path}:{n + 1}: empty completion" for n in range(0, 60, 2)]


def test_special_tokens_in_a_text_are_said(tmp_path):
    """They are read as those tokens; a start and an end at their places are what a row has anyway."""
    texts = [("a", "b"), ("<s>a", "b</s>"), ("a </s> b", "c"), ("a", "<pad>b"), ("a<s>", "b"), ("</s", ">b")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in texts]
    chat = [{"role": "user", "content": "a</s>"}, {"role": "assistant", "content": "b"}]
    rows += [{"input_ids": [5, 1, 6], "labels": [-100, 1, 6]}]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer(["a b c"] * 3, 300)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    report = prepared(str(source), tokenizer).report
    assert report.spelled_out == {f"{source}:3": "</s>", f"{source}:4": "<pad>", f"{source}:5": "<s>"}
    assert f"3 texts with special tokens, read as those tokens (rows kept): {source}:3 (</s>)" in report.summary()
    source.write_text(json.dumps({"messages": chat}) + "\n")
    assert prepared(str(source), tokenizer).report.spelled_out == {f"{source}:1": "</s>"}


def test_mixed_formats_are_converted_and_stated(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    rows = [{"question": "a", "answer": "b"}] * 2 + [{"prompt": "a", "completion": "b"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = prepared(str(path), tokenizer)
    assert len(data.train) == 3
    formats = describe_formats(data.summary.formats)
    assert formats == "mixed: question/answer (2 rows), prompt/completion (1 row)"


def test_unknown_format_names_the_fields_and_the_known_formats(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"body": "a", "id": 1}')
    with pytest.raises(DataError, match=r"a\.jsonl:1 has the fields body, id.*prompt, completion"):
        prepared(str(tmp_path / "a.jsonl"), tokenizer)


def test_no_rows_left_names_every_reason(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": ""}\n{"prompt": "a", "completion": "0123456789"}\n')
    with pytest.raises(DataError) as caught:
        load_data(SftOptions(data=str(path), tokenizer_size=300, max_length=4))
    text = str(caught.value)
    assert "2 rows dropped" in text
    assert f"1 x empty completion: {path}:1" in text
    assert f"1 x completion longer than max_length 4: {path}:2" in text


def test_tokenised_rows_cannot_train_a_tokenizer(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"input_ids": [1, 2], "labels": [-100, 2]}')
    with pytest.raises(DataError, match="tokenised already"):
        load_data(SftOptions(data=str(tmp_path / "a.jsonl")))


def test_columns_are_there_even_where_nothing_is_held_out(tmp_path):
    _, data = load_data(SftOptions(data=write(tmp_path / "a.jsonl", 2), tokenizer_size=300))
    assert data.heldout.column_names == data.train.column_names == ["input_ids", "labels", "length", "where"]
    assert len(data.heldout) == 0


def test_an_example_is_described_with_prompt_and_answer_apart(tmp_path):
    source = write(tmp_path / "a.jsonl", 1, start=7)
    tokenizer, data = load_data(SftOptions(data=source, tokenizer_size=300))
    lines = describe_example(data.train[0], tokenizer).splitlines()
    assert lines[0].startswith(f"{source}:1: ") and lines[0].endswith(" of them learned")
    learned = sum(label != -100 for label in data.train[0]["labels"])
    assert f", {learned} of them" in lines[0]
    assert lines[1:] == ["  read    | '<s>7 + 1 ='", "  learned | ' 8</s>'"]


def test_report_counts_by_reason_and_shows_the_first_places():
    report = DropReport()
    for line in range(1, 6):
        report.add(f"a:{line}", Reject("broken", f"column {line}"))
    report.add("b:1", Reject("empty"))
    assert (len(report), report.counts()) == (6, {"broken": 5, "empty": 1})
    assert report.summary(examples=2).splitlines() == [
        "6 rows dropped",
        "  5 x broken: a:1 (column 1), a:2 (column 2), ...",
        "  1 x empty: b:1",
    ]
    with pytest.raises(DataError, match=r"^c:1: broken \(column 9\)\. Fix"):
        report.add("c:1", Reject("broken", "column 9"), strict=True)


def test_collator_pads_on_the_right_to_a_multiple():
    rows = [
        {"input_ids": [1, 5, 6], "labels": [-100, 5, 6], "where": "a:1"},
        {"input_ids": [1], "labels": [1], "where": "a:2"},
        {"input_ids": [2, 2], "labels": [-100, -100], "where": "blank"},
    ]
    batch = PadToLongest(pad_token_id=3, multiple_of=4)(rows)
    assert batch.pop("where") == ["a:1", "a:2", "blank"]
    assert batch.pop("tokens") == 4
    assert batch.pop("label_tokens") == 2  # the first position of a row is predicted by nobody
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), torch.int64
    )
    assert batch["input_ids"].tolist() == [[1, 5, 6, 3], [1, 3, 3, 3], [2, 2, 3, 3]]
    assert batch["labels"].tolist() == [[-100, 5, 6, -100], [1, -100, -100, -100], [-100] * 4]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize(("multiple_of", "longest"), [(1, 8), (4, 8), (8, 8), (3, 9)])
def test_collator_adds_nothing_to_a_length_that_fits(multiple_of, longest):
    rows = [{"input_ids": [1] * 8, "labels": [1] * 8}]
    assert PadToLongest(0, multiple_of)(rows)["input_ids"].shape == (1, longest)


@pytest.mark.parametrize("rows", [[], [{"input_ids": [1, 2], "labels": [1]}]], ids=["none", "labels short"])
def test_collator_refuses(rows):
    with pytest.raises(ValueError, match="expected"):
        PadToLongest(0)(rows)


def rows_of(*rows: list[int]) -> datasets.Dataset:
    columns = {"input_ids": list(rows), "labels": list(rows), "length": list(map(len, rows))}
    columns["where"] = [f"a:{n}" for n in range(len(rows))]
    return datasets.Dataset.from_dict(columns, features=COLUMNS)


def test_the_digest_is_of_tokens_labels_and_where_rows_end(tmp_path, tokenizer):
    def digest(*rows: tuple[list[int], list[int]]) -> str:
        lines = (json.dumps({"input_ids": ids, "labels": labels}) + "\n" for ids, labels in rows)
        (tmp_path / "a.jsonl").write_text("".join(lines))
        return prepared(str(tmp_path / "a.jsonl"), tokenizer).digest

    first, second = ([5, 6, 7, 8], [-100, 6, 7, -100]), ([5, 6], [5, 6])
    assert digest(first, second) == digest(first, second)
    masked, cut = ([5, 6, 7, 8], [-100, -100, 7, -100]), ([5, 6, 7], [-100, 6, 7])
    others = [digest(second, first), digest(first), digest(masked, second), digest(cut, ([8, 5, 6], [-100, 5, 6]))]
    assert len({digest(first, second), *others}) == 5


@pytest.mark.parametrize(("count", "multiple", "blanks"), [(3, 4, 1), (4, 4, 0), (1, 4, 3), (5, 1, 0)])
def test_blank_rows_fill_a_batch_and_carry_no_label(count, multiple, blanks):
    rows = rows_of(*[[5, 6, 7]] * count)
    filled = fill_to_multiple(rows, multiple, token_id=2)
    assert len(filled) == count + blanks and filled[:count] == rows[:]
    for row in list(filled)[count:]:
        assert row == {"input_ids": [2, 2], "labels": [IGNORED, IGNORED], "length": 2, "where": "blank"}
