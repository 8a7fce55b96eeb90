"""A run resumes under another layout: tensor parallelism, data parallelism, ZeRO 1 or 2 may all change."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from launch.common.library_patches import place_step_counts
from tests.support.small_run import flags, launch_many, metrics, write_data, write_model

COMMON = {
    "smoothing": 0.1,
    "learning_rate": 1e-2,
    "max_steps": 8,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 8,
    "save_steps": 3,
    "save_total_limit": 5,
    "max_length": 96,
    "samples": 0,
}
# ranks, tensor parallelism, ZeRO stage
READ = {
    (2, 2, 1): [(1, 1, 1), (4, 4, 1)],
    (2, 1, 2): [(1, 1, 1), (4, 4, 2)],
}
PAIRS = [(written, read) for written, layouts in READ.items() for read in layouts]


def name(layout) -> str:
    return "ranks{}-tp{}-zero{}".format(*layout)


def command(folder: Path, layout, output: str) -> list[str]:
    ranks, tp, zero = layout
    values = COMMON | {
        "model": folder / "model-tied",
        "data": folder / "train.jsonl",
        "eval_data": folder / "heldout.jsonl",
        "output_dir": folder / output,
        "tp": tp,
        "zero": zero,
        "per_device_train_batch_size": 8 // (ranks // tp),
    }
    return flags(values)


def output(written, read) -> str:
    return f"{name(written)}-to-{name(read)}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Every run, by number of ranks and tensor parallelism: those that are interrupted, then those that resume."""
    folder = tmp_path_factory.mktemp("universal")
    write_data(folder)
    write_model(folder, tied=True, num_key_value_heads=4)
    for ranks, tp in {layout[:2] for layout in READ}:
        todo = [layout for layout in READ if layout[:2] == (ranks, tp)]
        launch_many(folder, ranks, [command(folder, layout, name(layout)) for layout in todo])
    for written, read in PAIRS:
        torn = folder / output(written, read)
        shutil.copytree(folder / name(written), torn)
        shutil.rmtree(torn / "model")
        for step in (6, 8):
            shutil.rmtree(torn / f"checkpoint-{step}", ignore_errors=True)
    for ranks, tp in sorted({read[:2] for _, read in PAIRS}):
        todo = [pair for pair in PAIRS if pair[1][:2] == (ranks, tp)]
        launch_many(folder, ranks, [command(folder, read, output(written, read)) for written, read in todo])
    return folder


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("written", "read"), PAIRS, ids=lambda layout: name(layout))
def test_losses_go_on(runs, written, read):
    whole, moved = metrics(runs / name(written)), metrics(runs / output(written, read))
    assert [row["step"] for row in moved] == [row["step"] for row in whole]
    for want, have in zip(whole, moved, strict=True):
        for key in want.keys() & {"loss", "nll", "eval_nll", "grad_norm", "lr", "label_tokens", "eval_label_tokens"}:
            assert have[key] == pytest.approx(want[key], rel=1e-4), (key, want["step"])
    assert not list((runs / output(written, read)).glob("*.partial"))
    manifest = json.loads((runs / output(written, read) / "checkpoint-8/manifest.json").read_text())
    assert manifest["facts"]["tp"] == read[1]


@pytest.mark.parametrize("fused", [True, False])
def test_a_fused_optimizer_finds_its_step_counts_beside_its_parameters(fused):
    """As DeepSpeed loads them: on the CPU, wherever the parameter is."""
    optimizer = torch.optim.AdamW([parameter := torch.nn.Parameter(torch.empty(3, device="meta"))])
    optimizer.param_groups[0]["fused"] = fused
    optimizer.state[parameter]["step"] = torch.tensor(5.0)
    place_step_counts(optimizer)
    assert optimizer.state[parameter]["step"].device.type == ("meta" if fused else "cpu")
