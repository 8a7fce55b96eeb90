"""`--sanity`: a sound run passes every check, and each check fails on what it is there to find."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.preflight import loss_checks
from launch.preflight.loss_checks import HeadInput
from launch.preflight.model_checks import check_mask
from smoothing import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from tests.support.forked import ForkedRuns
from tests.support.processes import ROOT, environment
from tests.support.small_run import flags, write_data, write_model

START_SECONDS = 120
CHANGING = """
import torch
from transformers import LlamaForCausalLM

class Changing(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        outputs.logits = outputs.logits * 2
        if labels is not None:
            outputs.loss = self.loss_function(logits=outputs.logits, labels=labels, vocab_size=self.vocab_size)
        return outputs
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sanity")
    write_data(folder)
    write_model(folder, tied=True, attention_dropout=0.1)
    write_model(folder, tied=False)
    return folder


def start(folder: Path, ranks: int | None = None, **values) -> tuple[int, str]:
    """Run `python launch/sft.py` in a fork, or with so many ranks; its exit code and what it printed."""
    given = {"data": folder / "train.jsonl", "max_length": 96, "per_device_train_batch_size": 4} | values
    log = folder / f"started-{len(list(folder.glob('started-*.log')))}.log"
    runs = ForkedRuns(ranks, [flags(given) if ranks else ["--sanity", *flags(given)]], log, cwd=folder)
    try:
        return runs.wait(START_SECONDS), log.read_text()
    finally:
        runs.end()


@pytest.mark.parametrize(("model", "tp"), [("model-tied", 2), ("model-untied", 3)], ids=["dropout", "uneven heads"])
def test_a_sound_run_passes(folder, model, tp):
    """As a user starts it."""
    given = {"data": folder / "train.jsonl", "max_length": 96, "per_device_train_batch_size": 4}
    given |= {"model": folder / model, "smoothing": 0.1, "tp": tp, "packing": True}
    given |= {"smoothing_prior": "unigram", "z_loss": 0.01}
    command = [sys.executable, str(ROOT / "launch/sft.py"), "--sanity", *flags(given)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("│ pass │") == 14 and "FAIL" not in done.stdout
    assert f"│ split over {tp} ranks" in done.stdout and f"model split over {tp} ranks" in done.stdout
    assert "the model itself: loss" in " ".join(done.stdout.split())
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("ranks", [None, 3])
def test_dropout_of_heads_that_ranks_cannot_share(folder, ranks):
    code, printed = start(folder, ranks, model=folder / "model-tied", tp=3, output_dir=folder / "uneven")
    assert code == 2 and "num_attention_heads 4 and num_key_value_heads 2 cannot be divided by 3" in printed
    assert "Traceback" not in printed


@pytest.fixture(scope="module")
def changing(folder) -> Path:
    """A model with code of its own, which changes its logits without saying so in its configuration."""
    (folder / "changing").mkdir()
    shutil.copy(folder / "train.jsonl", folder / "changing")
    path = write_model(folder / "changing", tied=True)
    (path / "modeling_changing.py").write_text(CHANGING)
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_changing.Changing"}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_model_whose_head_cannot_be_fused(folder, changing):
    code, printed = start(folder, model=changing, trust_remote_code=True, head="sharded", smoothing=0.1)
    assert code == 0, printed
    assert "changes its logits between output head and loss" in " ".join(printed.split())


def test_training_it_with_the_fused_head_is_refused_in_a_sentence(folder, changing):
    code, printed = start(folder, 1, model=changing, trust_remote_code=True, output_dir=folder / "refused")
    assert code == 2 and "use head='sharded' (the flag is --head)" in printed
    assert "Traceback" not in printed


def test_what_it_cannot_check_is_a_sentence(folder):
    code, printed = start(folder, model=folder / "nowhere")
    assert code == 2 and "error: " in printed and "Traceback" not in printed


@pytest.fixture
def given() -> HeadInput:
    torch.manual_seed(0)
    return HeadInput(torch.randn(40, 16), torch.randn(50, 16), torch.randint(50, (40,)), 0.1)


def test_heads_that_forget_the_smoothing_fail(given, monkeypatch):
    assert all(check.passed for check in loss_checks.check_heads(given))

    given = replace(given, prior_V=torch.rand(50).softmax(0), z_loss=0.1)
    assert all(check.passed for check in loss_checks.check_heads(given))
    for forgotten in ({"label_smoothing": 0.0}, {"smoothing_prior": None}, {"z_loss": 0.0}):
        for loss in (vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy):
            monkeypatch.setattr(
                loss_checks, loss.__name__, lambda *a, f=forgotten, plain=loss, **o: plain(*a, **(o | f))
            )
        assert not any(check.passed for check in loss_checks.check_heads(given))


def test_a_split_that_says_something_else_fails(given, monkeypatch):
    assert loss_checks.check_split(given, 2).passed
    given = replace(given, prior_V=torch.rand(50).softmax(0), z_loss=0.1)
    assert loss_checks.check_split(given, 2).passed
    plain = loss_checks.simulate_split
    for forgotten in ({"label_smoothing": 0.0}, {"smoothing_prior": None}, {"z_loss": 0.0}):
        monkeypatch.setattr(loss_checks, "simulate_split", lambda z, y, o, n, f=forgotten: plain(z, y, o | f, n))
        assert not loss_checks.check_split(given, 2).passed
    ignored = replace(given, target_T=torch.full_like(given.target_T, 10**6), prior_V=None, z_loss=0.0)
    monkeypatch.setattr(loss_checks, "simulate_split", plain)
    with pytest.raises(IndexError):
        loss_checks.check_split(ignored, 2)


def batch(labels: list[list[int]]) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([[1, 5, 6, 0], [1, 7, 8, 9]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "labels": torch.tensor(labels),
    }


@pytest.mark.parametrize(
    ("labels", "passed"),
    [
        ([[-100, -100, 6, -100], [-100, -100, 8, 9]], True),
        ([[-100, -100, 6, 0], [-100, -100, 8, 9]], False),  # padding is learned
        ([[-100, 6, -100, -100], [-100, -100, 8, 9]], False),  # shifted already
        ([[1, -100, -100, -100], [-100, -100, 8, 9]], False),  # a row of which nothing is learned
    ],
)
def test_masks(labels, passed):
    assert check_mask(batch(labels)).passed is passed


def test_what_the_run_would_refuse(folder):
    code, printed = start(folder, fp16="true", zero=0)
    assert code == 2 and "--fp16 needs --zero 1 or more" in printed
