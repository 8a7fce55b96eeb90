"""The mask, BOS and EOS, truncation: what a row of ids and labels holds."""

import json
import random

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from launch.common.errors import Reject
from launch.data.encode import encode
from launch.data.examples.formats import detect_format, to_example
from launch.data.examples.kinds import TextExample, TokenExample
from launch.data.read import sources_of
from launch.data.records import DataError, Record
from launch.data.sources.stdlib_docstrings import docstring_corpus, is_heldout
from launch.data.train_tokenizer import train_tokenizer
from launch.data.training_texts import training_texts
from tests.support.data import prepared


@pytest.fixture(scope="module")
def corpus():
    return docstring_corpus()


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer([r.fields["prompt"] + r.fields["completion"] for r in corpus.train[::5]], 2048)


def assert_masked(row, example, tokenizer):
    """Labels are the completion and one EOS, in one piece, after one BOS and the unlabelled prompt."""
    ids, labels = row["input_ids"], row["labels"]
    start = next(index for index, label in enumerate(labels) if label != -100)
    assert labels == [-100] * start + ids[start:]
    assert start >= 1
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[start:-1]) == example.completion
    read = tokenizer.decode(ids[1:start])
    if not row["prompt_tokens_cut"]:
        assert read == example.prompt
        assert ids[1:start] == tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
    assert ids[start:-1] == tokenizer(example.completion, add_special_tokens=False)["input_ids"]


def test_corpus_is_large_split_by_module_and_placed(corpus):
    assert len(corpus.train) > 3000
    assert 0.01 < len(corpus.heldout) / len(corpus.train) < 0.2
    modules = [
        {record.where.split("/")[0].split(":")[0].removesuffix(".py") for record in split}
        for split in (corpus.train, corpus.heldout)
    ]
    assert modules[0].isdisjoint(modules[1])
    assert corpus.unparsable < 10
    files = [record.where.rsplit(":", 1)[0] for record in corpus.train]
    assert files == sorted(files, key=lambda file: file.split("/"))
    # The same in every process and release, unlike hash().
    assert [is_heldout(name) for name in ("asyncio", "threading", "getopt", "json", "typing")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    decode = [r for r in corpus.train if r.where.startswith("json/decoder.py:")]
    prompts = {record.fields["prompt"]: record.fields["completion"] for record in decode}
    method = next(prompt for prompt in prompts if "    def raw_decode(self, s, idx=0):" in prompt)
    assert method == (
        '# json/decoder.py\nclass JSONDecoder(object):\n    def raw_decode(self, s, idx=0):\n        """'
    )
    assert prompts[method].startswith("Decode a JSON document from ``s``")


def test_corpus_of_a_directory_with_unusable_files(tmp_path):
    (tmp_path / "good.py").write_text(
        '"""Module."""\nif True:\n    @decorate(1)\n    async def f(a: int = 1, *b, c, **d) -> str:\n'
        '        """Does.\n\n            More.\n          End.\n        """\n'
        '        def g():\n            """Inner."""\n'
        "def nothing():\n    pass\n"
        'class C(B):\n    """Holds."""\n    class D:\n        def h(self): """H."""\n'
    )
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "binary.py").write_bytes(b"\0\xff")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text('"""Skipped."""')
    corpus = docstring_corpus(tmp_path)
    records = corpus.train + corpus.heldout
    assert corpus.unparsable == 2
    assert [(record.where, record.fields["completion"]) for record in records] == [
        ("good.py:1", "Module."),
        ("good.py:4", "Does.\n\n  More.\nEnd."),
        ("good.py:14", "Holds."),
        ("good.py:17", "H."),
    ]
    assert records[1].fields["prompt"] == (
        '# good.py\n@decorate(1)\nasync def f(a: int=1, *b, c, **d) -> str:\n    """'
    )
    assert records[3].fields["prompt"] == (
        '# good.py\nclass C(B):\n    class D:\n        def h(self):\n            """'
    )
    assert docstring_corpus(tmp_path) == corpus


def test_mask_on_docstrings(corpus, tokenizer):
    for record in random.Random(0).sample(corpus.train + corpus.heldout, 1000):
        example = to_example(record, "prompt/completion")
        assert_masked(encode(example, tokenizer, 4096), example, tokenizer)


def test_mask_and_places_on_questions(tmp_path, tokenizer):
    path = tmp_path / "questions.jsonl"
    rows = [
        {
            "question": f"Ann has {n} pens and buys {n}.\nHow many?",
            "answer": f"{n}+{n}=<<{2 * n}>>\n#### {2 * n}",
        }
        for n in range(40)
    ]
    rows[7]["answer"] = " "
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoded = prepared(str(path), tokenizer)
    assert encoded.summary.formats == {"question/answer": 39}
    assert (len(encoded.train), len(encoded.heldout)) == (37, 2)
    assert [(r.where, r.reason) for r in encoded.report.rejections] == [(f"{path}:8", "empty answer")]
    records = [Record(fields, f"{path}:{line}") for line, fields in enumerate(rows, start=1) if line != 8]
    by_place = {record.where: to_example(record, "question/answer").text for record in records}
    for row in [*encoded.train, *encoded.heldout]:
        example = by_place[row["where"]]
        assert example.completion.startswith(" ") and "#### " in example.completion
        assert_masked(row | {"prompt_tokens_cut": 0}, example, tokenizer)
    first = rows[0]
    ids = next(row for row in [*encoded.train, *encoded.heldout] if row["where"] == f"{path}:1")["input_ids"]
    assert tokenizer.decode(ids) == f"<s>Question: {first['question']}\nAnswer: {first['answer']}</s>"


@pytest.mark.parametrize(
    ("prompt", "completion", "text"),
    [
        ("p", "c", "<s>pc</s>"),
        ("", "c", "<s>c</s>"),
        ("<s>p", "c", "<s>pc</s>"),
        ("<s><s>p", "c</s>", "<s>pc</s>"),
        ("<s>", "c</s></s>", "<s>c</s>"),
        ("", "<s>c", "<s>c</s>"),
    ],
)
def test_one_bos_and_one_eos(tokenizer, prompt, completion, text):
    row = encode(TextExample(prompt, completion, "f:1"), tokenizer, 64)
    assert tokenizer.decode(row["input_ids"]) == text
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "c</s>"


def test_without_a_bos_token_none_is_added(tokenizer):
    tokenizer = train_tokenizer(["p c"], 300)
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.post_processor = None
    row = encode(TextExample("p", "c", "f:1"), tokenizer, 64)
    assert tokenizer.decode(row["input_ids"]) == "pc</s>"
    assert encode(TextExample("", "c", "f:1"), tokenizer, 64)["labels"][1] == tokenizer.eos_token_id


def test_a_tokenizer_that_adds_its_own_ends_adds_none_at_the_seam():
    tokenizer = train_tokenizer(["p c"], 300)
    ends = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = ends
    assert tokenizer.decode(tokenizer("p")["input_ids"]) == "<s>p</s>"
    row = encode(TextExample("p", "c", "f:1"), tokenizer, 64)
    assert tokenizer.decode(row["input_ids"]) == "<s>pc</s>"


def test_without_an_eos_token_is_an_error():
    tokenizer = train_tokenizer(["p c"], 300)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="EOS"):
        encode(TextExample("p", "c", "f:1"), tokenizer, 64)


def test_length_that_holds_no_label_is_an_error(tokenizer):
    with pytest.raises(DataError, match="max_length"):
        encode(TextExample("p", "c", "f:1"), tokenizer, 2)


def test_truncation_keeps_bos_the_end_of_the_prompt_and_the_whole_completion(tokenizer):
    example = TextExample("0123456789", "98765", "f:1")  # one token a digit
    whole = encode(example, tokenizer, 17)
    assert len(whole["input_ids"]) == 17 and whole["prompt_tokens_cut"] == 0
    for max_length in range(7, 17):
        row = encode(example, tokenizer, max_length)
        kept = max_length - 7
        assert row["prompt_tokens_cut"] == 10 - kept
        assert len(row["input_ids"]) == len(row["labels"]) == max_length
        assert tokenizer.decode(row["input_ids"]) == f"<s>{'0123456789'[10 - kept :]}98765</s>"
        assert row["labels"] == [-100] * (1 + kept) + whole["labels"][-6:]
    with pytest.raises(Reject, match="completion longer than max_length 6") as caught:
        encode(example, tokenizer, 6)
    assert caught.value.reason == "completion longer than max_length 6"


def test_truncated_prompts_are_counted_and_kept(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "0" * n, "completion": "1"} for n in (1, 50, 2, 60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    encoded = prepared(str(path), tokenizer, 20, strict=True)
    assert len(encoded.train) == 4
    assert encoded.report.truncated == [f"{path}:2", f"{path}:4"]
    assert f"2 prompts shortened from the left (rows kept): {path}:2, {path}:4" in encoded.report.summary()


def test_tokenised_rows_are_used_as_they_are(tokenizer):
    example = TokenExample([5, 6, 7], [-100, 6, -100], "f:1")
    assert encode(example, tokenizer, 3) == {
        "input_ids": [5, 6, 7],
        "labels": [-100, 6, -100],
        "prompt_tokens_cut": 0,
        "notes": [],
        "text": "",
        "spans": [],
    }


def test_default_corpus_end_to_end(corpus, tokenizer, monkeypatch):
    monkeypatch.setattr("launch.data.read.docstring_corpus", lambda: corpus)
    assert {detect_format(record.fields) for record in corpus.train} == {"prompt/completion"}
    assert len(list(training_texts(sources_of(None).train))) == len(corpus.train)
    encoded = prepared(None, tokenizer, 256)
    assert list(encoded.summary.formats) == ["prompt/completion"]
    dropped = encoded.report.counts()
    assert list(dropped) == ["completion longer than max_length 256"]
    total = len(corpus.train) + len(corpus.heldout)
    assert len(encoded.train) + len(encoded.heldout) + len(encoded.report) == total
    assert all(".py:" in rejected.where for rejected in encoded.report.rejections)


def test_what_a_tokenizer_refuses_costs_its_row():
    words = Tokenizer(WordLevel({"a": 0, "</s>": 1}, unk_token="[UNK]"))  # which it does not have
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    assert encode(TextExample("a", " a", "f:1"), tokenizer, 8)["input_ids"] == [0, 0, 1]
    with pytest.raises(Reject, match=r"the tokenizer refuses the text .*UNK"):
        encode(TextExample("a", " b", "f:1"), tokenizer, 8)
