"""The trained tokenizer loses nothing, is the same each time, and survives being saved."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from launch.data.records import DataError
from launch.data.train_tokenizer import train_tokenizer

TEXTS = [
    'def f(a,  b):\n    """Add ``a`` to b."""\n    if a:\n\t\treturn a + b  # sum\n\n\n',
    "class Café:\n    x = 'naïve'\n    def __init__(self, x=10, y=2025):\n        self.x = x\n",
    "Question: 12 + 34?\nAnswer: 46\n\n#### 46",
] * 4
SAMPLES = [
    "",
    " ",
    "\n",
    "   leading and trailing   \n\n",
    "\tif x:\r\n        pass\n",
    "naïve 日本語 😀 👩‍👩‍👧 e\u0301 \u00a0\u2003",
    "\u2581 is SentencePiece's space mark",
    "<0x0A> is no byte, <0x41> neither",
    "a , b ' s n 't .",
    "\0\x01\x7f\ufffd\ufeff",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


@pytest.fixture(scope="module")
def loaded(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS[:3] + SAMPLES)
def test_round_trip(tokenizer, loaded, text):
    assert ids(loaded, text) == ids(tokenizer, text)
    assert tokenizer.decode(ids(tokenizer, text)) == text
    assert loaded.decode(ids(tokenizer, text)) == text


@settings(max_examples=300, deadline=None)
@given(st.text(), st.text(alphabet=" \n\tab1_\u2581é😀"))
def test_round_trip_and_seam_of_any_text(tokenizer, prompt, completion):
    joined = ids(tokenizer, prompt) + ids(tokenizer, completion)
    assert tokenizer.decode(joined) == prompt + completion


def test_special_tokens(tokenizer, loaded):
    for each in (tokenizer, loaded):
        assert (each.unk_token_id, each.bos_token_id, each.eos_token_id, each.pad_token_id) == (0, 1, 2, 3)
        assert each.convert_ids_to_tokens([0, 1, 2, 3]) == ["<unk>", "<s>", "</s>", "<pad>"]
        assert len(each) == len(tokenizer) == each.vocab_size


def test_pieces_are_learned_and_never_unknown(tokenizer):
    assert len(ids(tokenizer, TEXTS[0])) < len(TEXTS[0]) / 2
    assert tokenizer.unk_token_id not in ids(tokenizer, "".join(map(chr, range(1, 0x3000))))


def test_the_same_texts_give_the_same_tokenizer(tokenizer):
    assert train_tokenizer(iter(TEXTS), 400).get_vocab() == tokenizer.get_vocab()


def test_text_that_looks_like_a_byte_piece_stays_text():
    text = "<0x0A>x<0x0A> <0x41>"
    tokenizer = train_tokenizer([text] * 50, 300)
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_a_vocabulary_too_large_for_the_texts_is_reduced_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = train_tokenizer(["aa bb"], 5000)
    assert 260 < len(tokenizer) < 300
    assert "not the 5000 requested" in caplog.text


@pytest.mark.parametrize(
    ("texts", "vocab_size"),
    [
        ([], 400),
        (["", " \n"], 400),
        (["text"], 260),
        (["text"], 0),
        (["".join(map(chr, range(0x4E00, 0x5000)))], 300),
    ],
    ids=["no texts", "blank texts", "no room beside bytes", "zero", "no room for the characters"],
)
def test_what_cannot_be_trained_is_an_error(texts, vocab_size):
    with pytest.raises(DataError):
        train_tokenizer(texts, vocab_size)
