"""The characters that tokens stand for, told by their bytes: those of the tokenizer's own offsets, or no answer."""

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from launch.data.encode import Encoder
from launch.data.encode_batch import BatchEncoder, Kept
from launch.data.examples.token_bytes import TokenBytes
from launch.data.examples.tokens import Tokeniser
from launch.data.records import Record, Rejected
from tests.support.tokenizers import byte_level, llama_2_like

BYTE_NAMES = bytes_to_unicode()


def changed(normalizer=None, prefix=False, added=()):
    tokenizer = byte_level("<|im_end|>", "<s>")
    backend = tokenizer.backend_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.add_special_tokens(list(added))
    return tokenizer


TOKENIZERS = {
    "plain": changed(),
    "NFC": changed(normalizers.NFC()),
    "lower case": changed(normalizers.Lowercase()),
    "takes blanks": changed(added=[AddedToken("<take>", lstrip=True, rstrip=True)]),
}
TEXTS = st.lists(st.sampled_from(["hello ", "<|im_start|>", "<take>", " ", "\n", "é", "e\u0301", "😀", "A", "日本"]))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(TEXTS.map("".join))
def test_spans_are_the_offsets_of_the_tokenizer(name, text):
    backend = TOKENIZERS[name].backend_tokenizer
    encoded = backend.encode(text, add_special_tokens=False)
    found = TokenBytes.of(TOKENIZERS[name]).spans(numpy.array(encoded.ids, numpy.int32), text)
    if found is not None:
        assert found.tolist() == [list(offsets) for offsets in encoded.offsets]
    tiles = name == "plain" and "<take>" not in text
    assert found is not None or not tiles


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(TEXTS.map("".join))
def test_tokens_are_those_of_the_tokenizer(name, text):
    tokenizer = TOKENIZERS[name]
    assert Tokeniser(tokenizer)(text).ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_text_that_its_tokens_do_not_spell_has_no_spans():
    for name, text in [("lower case", "AB"), ("NFC", "e\u0301e\u0301"), ("takes blanks", "a <take> b")]:
        ids = numpy.array(TOKENIZERS[name](text, add_special_tokens=False)["input_ids"], numpy.int32)
        assert TokenBytes.of(TOKENIZERS[name]).spans(ids, text) is None


def test_tokenizers_whose_tokens_are_not_the_bytes_of_a_text():
    assert TokenBytes.of(changed(prefix=True)) is None
    assert TokenBytes.of(llama_2_like()) is None


def test_an_unknown_token_stands_for_any_number_of_bytes():
    names = ["<unk>", "a", "1", *map(BYTE_NAMES.get, " \né".encode())]
    model = models.BPE({name: index for index, name in enumerate(names)}, [], unk_token="<unk>", fuse_unk=True)
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    found = TokenBytes.of(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    for text, known in [("a1", True), ("bbbbb", False)]:  # "<unk>" has five bytes, too
        ids = numpy.array(backend.encode(text).ids, numpy.int32)
        assert (found.spans(ids, text) is not None) == known


def test_a_text_that_is_refused_costs_its_row_alone():
    names = ["</s>", "a", "1", "ĠÃ©", "Ċ"]
    backend = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, "<unk>"))  # has none
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert TokenBytes.of(tokenizer) is not None
    rows = [Record({"text": text}, f"f:{line}") for line, text in enumerate(["a", "b", "1 é"])]
    made = BatchEncoder(tokenizer, Encoder(tokenizer, 8))(rows)
    assert [type(outcome) for outcome in made.outcomes] == [Kept, Rejected, Kept]
    assert made.outcomes[1].reason == "the tokenizer refuses the text"
    assert made.rows.column("input_ids").to_pylist() == [[1, 0], [2, 3, 0]]


def test_what_a_call_left_in_the_tokenizer_is_undone():
    tokenizer = byte_level("<|im_end|>")
    tokenise, text = Tokeniser(tokenizer), "hello <|im_end|> yes" * 3
    before = tokenise(text).ids.tolist()
    for options in ({"truncation": True, "max_length": 3}, {"split_special_tokens": True}):
        tokenizer(text, **options)
        assert tokenise(text).ids.tolist() == before
