"""Where smoothing's mass goes: counted labels, or a file's numbers, and what neither can be."""

import json
from types import SimpleNamespace

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.common.errors import UserError
from launch.config.options import SftOptions, check_options
from launch.data.label_counts import label_counts
from launch.data.prepared import EncodedData
from launch.model.smoothing_prior import check_prior_file, read_prior, smoothing_prior, unigram
from tests.support.data import prepared
from tests.support.tokenizers import byte_level

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
    {"input_ids": [5, 6, 6, 9], "labels": [-100, -100, 6, 9]},
    {"input_ids": [8, 8], "labels": [-100, 8]},
]
COUNTS = {6: 2, 7: 1, 8: 1, 9: 1}  # the first label of a row is never predicted


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level("</s>")


@pytest.fixture
def data(tmp_path, tokenizer) -> EncodedData:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return prepared(str(tmp_path / "rows.jsonl"), tokenizer, fraction=0.0)


def test_counts_are_of_what_is_predicted(data):
    assert {token: count for token, count in enumerate(label_counts(data)) if count} == COUNTS


def test_a_source_counts_by_its_weight(tmp_path, tokenizer):
    """Of ten rows in an epoch three sources of four, four and two rows give five, none and five."""
    counts = {}
    for label, rows in ((5, 4), (6, 4), (7, 2)):
        counts[label] = [{"input_ids": [4, label], "labels": [-100, label]}] * rows
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for rows in counts.values() for row in rows))
    one = prepared(str(tmp_path / "rows.jsonl"), tokenizer, fraction=0.0)
    sources = SimpleNamespace(
        sources=[range(4), range(4, 8), range(8, 10)], train=one.train, weights=[1.0, 0.001, 1.0]
    )
    assert label_counts(sources)[5:].tolist() == [5, 0, 5]


def test_each_token_counts_once_more_and_rows_that_are_none_get_nothing():
    prior, words = unigram(numpy.array([0.0, 3.0, 0.0, 2.0]), numpy.array([0, 1, 2, 3, 5]), 8)
    assert prior.tolist() == pytest.approx([0.1, 0.4, 0.1, 0.3, 0, 0.1, 0, 0])
    assert "5 labels" in words and "3 of them never" in words and "3 rows of the head" in words


def of_size(vocab: int):
    return SimpleNamespace(get_output_embeddings=lambda: torch.nn.Linear(4, vocab))


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_file_is_made_to_sum_to_1_and_kept_by_the_run(tmp_path, data, tokenizer, suffix):
    file, run = tmp_path / f"prior{suffix}", tmp_path / "run"
    run.mkdir()
    wanted = torch.arange(len(tokenizer), dtype=torch.float64)
    wanted /= wanted.sum()
    numpy.save(file, wanted.numpy() * 1.0005) if suffix == ".npy" else save_file({"u": wanted * 0.9995}, file)
    options = SftOptions(model="m", smoothing_prior=str(file))
    vocab = len(tokenizer) + 3
    prior = smoothing_prior(options, data, tokenizer, of_size(vocab), run)
    torch.testing.assert_close(prior[:-3].double(), wanted, rtol=1e-6, atol=0)
    assert prior[-3:].tolist() == [0, 0, 0] and prior.dtype == torch.float32
    file.unlink()
    check_prior_file(options, str(run))
    assert torch.equal(smoothing_prior(options, data, tokenizer, of_size(vocab), run), prior)
    assert torch.equal(load_file(run / "smoothing_prior.safetensors")["smoothing_prior"], prior)
    with pytest.raises(UserError, match="no such file"):
        check_prior_file(options, str(tmp_path / "another"))


def test_a_counted_one_is_not_counted_again(tmp_path, data, tokenizer):
    options = SftOptions(model="m", smoothing_prior="unigram")
    first = smoothing_prior(options, data, tokenizer, of_size(len(tokenizer)), tmp_path)
    (empty,) = [SimpleNamespace(sources=[], weights=None)]
    assert torch.equal(smoothing_prior(options, empty, tokenizer, of_size(len(tokenizer)), tmp_path), first)
    assert smoothing_prior(SftOptions(model="m"), data, tokenizer, of_size(5)) is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.5, 0.5], r"one number for each row of the model's head \(4, or 3 for the tokenizer's tokens\).*\(2,\)"),
        ([[0.25] * 4], r"got shape \(1, 4\)"),
        ([3.0, 1.0, 0.0, 0.0], "must sum to 1, got 4; divide"),
        ([1.1, -0.1, 0.0, 0.0], "at least 0, got -0.1 at 1"),
        ([float("nan"), 1.0, 0.0, 0.0], "got nan at 0"),
        (b"torn", "cannot be read"),
    ],
)
def test_files_that_are_no_distribution(tmp_path, values, words):
    file = tmp_path / "prior.npy"
    file.write_bytes(values) if isinstance(values, bytes) else numpy.save(file, numpy.array(values))
    with pytest.raises(UserError, match=words):
        read_prior(file, 4, 3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"smoothing_prior": "bigram"}, "must be uniform, unigram, or a file of .npy or .safetensors, got 'bigram'"),
        ({"smoothing_prior": "unigram", "head": "dense"}, "--head dense, which is F.cross_entropy"),
        ({"smoothing_prior": "unigram", "smoothing": 0.0}, "--smoothing goes, which is 0"),
        ({"smoothing_prior": "unigram", "streaming": True, "data": ["a"]}, "which --streaming does not read"),
        ({"z_loss": -1.0}, "--z_loss must be a finite number of at least 0, got -1"),
        ({"z_loss": float("inf")}, "--z_loss must be a finite number"),
        ({"z_loss": 1e-4, "head": "dense"}, "--z_loss cannot be used with --head dense"),
    ],
)
def test_flags_that_contradict(flags, words):
    with pytest.raises(UserError, match=words):
        check_options(SftOptions(model="m", **flags))
