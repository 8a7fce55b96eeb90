"""Rows that do not divide over ranks: the losses, counts and weights of one process, each row once an epoch."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.small_run import flags, launch_many, metrics, write_data, write_model

COMMON = {
    "smoothing": 0.1,
    "optim": "sgd",
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "num_train_epochs": 2,
    "logging_steps": 1,
    "eval_strategy": "no",
    "eval_on_start": False,
    "max_length": 96,
    "samples": 0,
    "save_strategy": "no",
}
ROWS = (37, 33, 1)  # steps of 8
# rows, accumulation, ZeRO stage; on two ranks, of 4 rows or 2
SETUPS = [(37, 1, 1), (37, 2, 3), (33, 1, 3), (33, 2, 1), (1, 1, 1)]
SAVED = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 5}  # 5 steps an epoch
SAME = ("loss", "nll", "accuracy", "grad_norm")


def name(rows: int, accumulate: int = 1, zero: int = 0, ranks: int = 2) -> str:
    return f"rows{rows}-ranks{ranks}-accumulate{accumulate}-zero{zero}"


def command(folder: Path, rows: int, accumulate: int = 1, zero: int = 0, ranks: int = 2, **more) -> list[str]:
    values = COMMON | {
        "model": folder / "model-tied",
        "data": folder / f"{rows}.jsonl",
        "eval_data": folder / "heldout.jsonl",
        "output_dir": folder / name(rows, accumulate, zero, ranks),
        "zero": zero,
        "gradient_accumulation_steps": accumulate,
        "per_device_train_batch_size": 8 // accumulate // ranks,
    }
    return flags(values | more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("once")
    write_data(folder)
    write_model(folder, tied=True)
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    for rows in ROWS:
        (folder / f"{rows}.jsonl").write_text("".join(lines[:rows]))
    launch_many(folder, 1, [command(folder, rows, ranks=1) for rows in ROWS])
    saved = SAVED | {"output_dir": folder / "resumed"}
    launch_many(folder, 2, [*(command(folder, *setup) for setup in SETUPS), command(folder, *SETUPS[3], **saved)])
    for later in ("model", "checkpoint-9", "checkpoint-10"):
        shutil.rmtree(folder / "resumed" / later)
    said = launch_many(folder, 2, [command(folder, *SETUPS[3], **saved)])
    assert "checkpoint-6\n" in said
    return folder


@pytest.mark.parametrize("setup", [*SETUPS, "resumed"], ids=str)
def test_the_run_of_one_process(runs, setup):
    alone = runs / name(33 if setup == "resumed" else setup[0], ranks=1)
    other = runs / ("resumed" if setup == "resumed" else name(*setup))
    expected, got = metrics(alone), metrics(other)
    for want, have in zip(expected, got, strict=True):
        assert [have[key] for key in SAME] == pytest.approx([want[key] for key in SAME], rel=1e-5), want["step"]
        assert all(have[key] == want[key] for key in ("step", "lr", "label_tokens", "tokens"))
    expected, got = (load_file(run / "model" / "model.safetensors") for run in (alone, other))
    for key, weight in expected.items():
        torch.testing.assert_close(got[key], weight, rtol=1e-5, atol=1e-6)
