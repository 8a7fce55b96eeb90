"""Runs of packed rows: the losses, counts and weights of a run of the same rows unpacked, on any layout."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from tests.support.small_run import flags, launch_many, metrics, write_data, write_model

# every step takes all rows, so that it is the same step however they are packed
COMMON = {
    "smoothing": 0.1,
    "optim": "sgd",
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 3,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "max_length": 256,
    "samples": 1,
    "save_strategy": "no",
}
PACKED = {
    "one-process": {"packing": True},
    "tp2-zero1": {"packing": True, "tp": 2, "zero": 1},
    "dp2-zero3": {"packing": True, "zero": 3, "gradient_checkpointing": True},
}
# four steps an epoch, the last with blank sequences; interrupted in the second epoch
SAVED = {
    "packing": True,
    "per_device_train_batch_size": 2,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 5,
    "eval_strategy": "no",
    "learning_rate": 0.03,
}


def command(folder: Path, output: str, **more) -> list[str]:
    values = COMMON | {
        "model": folder / "model-tied",
        "data": folder / "train.jsonl",
        "eval_data": folder / "heldout.jsonl",
        "output_dir": folder / output,
    }
    return flags(values | more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    write_data(folder)
    write_model(folder, tied=True, max_position_embeddings=256)
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=403,
            hidden_size=64,
            word_embed_proj_dim=64,
            ffn_dim=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
        )
    )
    opt.save_pretrained(folder / "opt")
    AutoTokenizer.from_pretrained(folder / "model-tied").save_pretrained(folder / "opt")
    alone = [command(folder, "unpacked"), command(folder, "one-process", **PACKED["one-process"])]
    (folder / "alone.txt").write_text(launch_many(folder, 1, alone))
    refused = {"model": folder / "opt", "packing": True}
    # one start each: a process cannot change its tensor parallelism
    tp = [command(folder, "tp2-zero1", **PACKED["tp2-zero1"]), command(folder, "refused-tp2", tp=2, **refused)]
    said = [launch_many(folder, 2, tp, code=2)]
    launch_many(folder, 2, [command(folder, "dp2-zero3", **PACKED["dp2-zero3"]), command(folder, "whole", **SAVED)])
    shutil.copytree(folder / "whole", folder / "resumed")
    for later in ("model", "checkpoint-8"):
        shutil.rmtree(folder / "resumed" / later)
    dp = [command(folder, "resumed", **SAVED), command(folder, "refused-zero3", zero=3, **refused)]
    said.append(launch_many(folder, 2, dp, code=2))
    (folder / "refused.txt").write_text("".join(said))
    return folder


def completions(run) -> list[str]:
    return [json.loads(line)["completion"] for line in (run / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", PACKED)
def test_the_run_of_the_same_rows_unpacked(runs, name):
    expected, got = metrics(runs / "unpacked"), metrics(runs / name)
    assert [row["step"] for row in got] == [row["step"] for row in expected]
    for want, have in zip(expected, got, strict=True):
        for key in want.keys() & {"loss", "nll", "accuracy", "grad_norm", "eval_nll", "eval_accuracy"}:
            assert have[key] == pytest.approx(want[key], rel=1e-5), (key, want["step"])
        assert all(have[key] == want[key] for key in want.keys() & {"label_tokens", "tokens", "eval_label_tokens"})
    expected, got = (load_file(runs / run / "model" / "model.safetensors") for run in ("unpacked", name))
    for key, weight in expected.items():
        torch.testing.assert_close(got[key], weight, rtol=1e-5, atol=1e-6)
    assert completions(runs / name) == completions(runs / "unpacked")


def test_the_log_says_how_full_sequences_are(runs):
    said = (runs / "alone.txt").read_text()
    assert said.count("packing: 40 rows in ") == 1 and said.count("packing: 7 rows in ") == 1


def test_a_resumed_run_takes_the_sequences_that_are_left(runs):
    whole, resumed = (
        [
            {key: value for key, value in row.items() if key not in ("tokens_per_second", "peak_memory_gib")}
            for row in run
        ]
        for run in (metrics(runs / "whole"), metrics(runs / "resumed"))
    )
    assert whole == resumed
    weights = [(runs / run / "model/model.safetensors").read_bytes() for run in ("whole", "resumed")]
    assert weights[0] == weights[1]


def test_a_model_that_attends_across_rows_is_refused_on_all_ranks(runs):
    said = (runs / "refused.txt").read_text()
    assert said.count("--packing: OPTForCausalLM attends across packed rows") == 2 and "Traceback" not in said
    assert not list(runs.glob("refused-*/model"))
