"""bf16 with gradients in fp32, under tensor parallelism: checkpoints change nothing, and ZeRO stages learn alike.

All runs have a schedule that reads the optimizer's defaults (`min_lr`), which those of DeepSpeed do not have.
"""

import json
import math
from pathlib import Path

import pytest

from tests.support.small_run import ROOT, flags, launch_many, metrics, write_data, write_model

COMMON = {
    "smoothing": 0.1,
    "optim": "sgd",
    "learning_rate": 0.3,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": json.dumps({"min_lr": 0.1}),
    "warmup_steps": 0,
    "max_steps": 6,
    "logging_steps": 1,
    "eval_strategy": "no",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_length": 96,
    "samples": 0,
    "save_strategy": "no",
    "bf16": True,
    "tp": 2,
}
SAVED = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    write_data(folder)
    model = write_model(folder, tied=False)
    config = json.loads((ROOT / "ds_configs/zero1_tp.json").read_text())
    (folder / "fp32.json").write_text(json.dumps(config | {"data_types": {"grad_accum_dtype": "fp32"}}))
    fp32 = {"deepspeed": folder / "fp32.json"}
    values = {"zero1": fp32, "zero1-saved": fp32 | SAVED, "zero2": {"zero": 2}, "zero3": {"zero": 3} | SAVED}
    common = COMMON | {"model": model, "data": folder / "train.jsonl"}
    launch_many(folder, 2, [flags(common | more | {"output_dir": folder / run}) for run, more in values.items()])
    return folder


def test_a_checkpoint_does_not_stop_the_training(runs):
    """DeepSpeed's optimizer for this no longer reaches split weights once a checkpoint has gathered them."""
    times = {"tokens_per_second", "peak_memory_gib"}
    plain, saved = (
        [{key: row[key] for key in row.keys() - times} for row in metrics(runs / run)]
        for run in ("zero1", "zero1-saved")
    )
    assert saved == plain and plain[-1]["loss"] < plain[0]["loss"] - 1
    one, other = ((runs / run / "model/model.safetensors").read_bytes() for run in ("zero1", "zero1-saved"))
    assert one == other


@pytest.mark.parametrize("run", ["zero2", "zero3"])
def test_stages_learn_alike_with_fp32_gradients_by_default(runs, run):
    assert json.loads((runs / run / "deepspeed.json").read_text())["data_types"] == {"grad_accum_dtype": "fp32"}
    for want, have in zip(metrics(runs / "zero1"), metrics(runs / run), strict=True):
        assert have["loss"] == pytest.approx(want["loss"], rel=1e-3), want["step"]
        assert have["grad_norm"] == pytest.approx(want["grad_norm"], rel=5e-3), want["step"]


@pytest.mark.parametrize("run", ["zero1", "zero2", "zero3"])
def test_the_rate_ends_at_its_minimum(runs, run):
    rates = [0.1 + 0.2 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert [row["lr"] for row in metrics(runs / run)] == pytest.approx(rates)
