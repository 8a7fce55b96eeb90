"""`--streaming`: one process, data- and tensor-parallel ranks, and a resumed run train on the same rows."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.small_run import flags, launch_many, metrics, write_data, write_model

COMMON = {
    "streaming": True,
    "shuffle_buffer": 8,
    "max_steps": 8,  # of 8 rows; an epoch has 39 records, of which 2 are held out
    "smoothing": 0.1,
    "optim": "sgd",
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "max_length": 96,
    "samples": 0,
    "save_strategy": "steps",
    "save_steps": 4,
}
SETUPS = {  # ranks, and more flags
    "alone": (1, {"per_device_train_batch_size": 8}),
    "data-parallel": (2, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "tensor-parallel": (2, {"per_device_train_batch_size": 8, "tp": 2}),
}
SAME = ("loss", "nll", "accuracy", "grad_norm", "eval_nll")


def command(folder: Path, name: str, output: str) -> list[str]:
    places = {"model": folder / "model-tied", "data": folder / "bad.jsonl", "output_dir": folder / output}
    return flags(COMMON | places | SETUPS[name][1])


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, str]:
    """What each run printed, and the folder of all."""
    folder = tmp_path_factory.mktemp("streaming")
    write_data(folder)
    write_model(folder, tied=True)
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    lines[5:6] = ["{broken\n", json.dumps({"question": "?", "answer": "too long " * 100}) + "\n"]
    (folder / "bad.jsonl").write_text("".join(lines))
    printed = {name: launch_many(folder, ranks, [command(folder, name, name)]) for name, (ranks, _) in SETUPS.items()}
    shutil.copytree(folder / "data-parallel", folder / "resumed")
    for later in ("model", "checkpoint-8"):
        shutil.rmtree(folder / "resumed" / later)
    printed["resumed"] = launch_many(folder, 2, [command(folder, "data-parallel", "resumed")])
    return printed | {"folder": str(folder)}


@pytest.mark.parametrize("name", list(SETUPS)[1:])
def test_the_run_of_one_process(said, name):
    folder = Path(said["folder"])
    for want, have in zip(metrics(folder / "alone"), metrics(folder / name), strict=True):
        keys = [key for key in SAME if key in want]
        assert [have[key] for key in keys] == pytest.approx([want[key] for key in keys], rel=1e-5), want["step"]
        assert have["step"] == want["step"]
        assert all(have.get(key) == want.get(key) for key in ("label_tokens", "tokens", "eval_label_tokens"))
    expected, got = (load_file(folder / run / "model/model.safetensors") for run in ("alone", name))
    for key, weight in expected.items():
        torch.testing.assert_close(got[key], weight, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_is_the_same_to_the_bit(said):
    folder = Path(said["folder"])
    assert "checkpoint-4\n" in said["resumed"]
    timed = ("tokens_per_second", "peak_memory_gib")
    expected, got = (
        [{key: value for key, value in row.items() if key not in timed} for row in metrics(folder / run)]
        for run in ("data-parallel", "resumed")
    )
    assert got == expected
    weights = [(folder / run / "model/model.safetensors").read_bytes() for run in ("data-parallel", "resumed")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("name", SETUPS)
def test_what_is_dropped_is_told_once_an_epoch(said, name):
    assert "data: epoch 1 has ended; 2 of 39 rows dropped\n" in said[name]
    assert "rows dropped since this start; dropped.txt names them\n" in said[name]
    named = (Path(said["folder"]) / name / "dropped.txt").read_text().splitlines()
    assert sum("bad.jsonl:6: broken JSON" in line for line in named) == 2
    assert 1 <= sum("bad.jsonl:7: completion longer than max_length 96" in line for line in named) <= 2
