"""A step that is not finite: told with its rows, stopped at or left out on all ranks, and never put into weights."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.common.errors import UserError
from launch.training.nonfinite import IN_A_ROW, NonFiniteSteps
from tests.support.small_run import flags, launch_many, metrics, write_data, write_model

POISON = 309  # the tokenizer's last token, of one row; its embedding is not a number
BAD_ROW = 20  # which the second data-parallel rank takes: the first has to be told
COMMON = {
    "smoothing": 0.1,
    "learning_rate": 1e-2,
    "max_steps": 5,  # an epoch of 40 rows
    "logging_steps": 1,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "max_length": 96,
    "samples": 0,
}
# tensor parallelism, accumulation, ZeRO stage, and "bf16", where DeepSpeed's own search is left out without tp
LAYOUTS = [
    (1, 1, 0),
    (1, 1, 1),
    (1, 1, 1, "bf16"),
    (1, 2, 2),
    (1, 1, 2, "bf16"),
    (1, 1, 3),
    (2, 1, 0),
    (2, 2, 1),
    (2, 1, 1, "bf16"),
    (2, 1, 2),
]


def name(layout) -> str:
    tp, accumulation, zero, *more = layout
    return "-".join([f"tp{tp}-accumulate{accumulation}-zero{zero}", *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nonfinite")
    write_data(folder)
    model = write_model(folder, tied=False)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    rows = [{"input_ids": list(range(3, 30)), "labels": list(range(3, 30))} for _ in range(40)]
    tokens = [POISON if token == 20 else token for token in rows[0]["input_ids"]]
    rows[BAD_ROW - 1] = {"input_ids": tokens, "labels": tokens}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def command(folder: Path, layout, output: str, **more) -> list[str]:
    tp, accumulation, zero, *bf16 = layout
    values = COMMON | {
        "model": folder / "model-untied",
        "data": folder / "rows.jsonl",
        "eval_fraction": 0,
        "output_dir": folder / output,
        "tp": tp,
        "zero": zero,
        "bf16": bool(bf16),
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 8 // accumulation // (2 // tp),
    }
    return flags(values | more)


@pytest.fixture(scope="module")
def skipped(folder) -> str:
    said = ""
    for tp, fp32 in product((1, 2), (True, False)):  # DeepSpeed splits models of one dtype in a process
        layouts = [layout for layout in LAYOUTS if layout[0] == tp and (len(layout) == 3) == fp32]
        todo = [command(folder, layout, name(layout), on_nonfinite="skip") for layout in layouts]
        said += launch_many(folder, 2, todo)
    return said


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_left_out_on_all_ranks(folder, skipped, layout):
    run = folder / name(layout)
    before = load_file(folder / "model-untied/model.safetensors")
    after = load_file(run / "model/model.safetensors")
    poisoned = before["model.embed_tokens.weight"][POISON].isnan()
    assert poisoned.all()
    for key, weight in after.items():
        finite = weight.isfinite()
        if key == "model.embed_tokens.weight":
            finite[POISON] = True
        assert finite.all(), key
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    rows = [row for row in metrics(run) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert sum(row["label_tokens"] == 0 for row in rows) == 1  # the step that was left out counts nothing
    assert all(row["nll"] is not None for row in rows)


def test_the_row_is_named(skipped):
    said = [line for line in skipped.splitlines() if "not finite" in line]
    assert len(said) == len(LAYOUTS)
    assert all(f"rows.jsonl:{BAD_ROW} is not finite; step skipped (1 so far)" in line for line in said)


@pytest.mark.parametrize("layout", [(1, 1, 2), (2, 1, 1)], ids=name)
def test_stopped_by_default(folder, layout):
    said = launch_many(folder, 2, [command(folder, layout, f"stopped-{name(layout)}")], code=2)
    assert f"rows.jsonl:{BAD_ROW} is not finite. The update was not made and the run stops" in said
    assert "Traceback" not in said
    assert not (folder / f"stopped-{name(layout)}" / "model").exists()


def test_weights_that_are_not_finite_are_neither_saved_nor_exported(folder):
    """A step whose loss and gradients were finite makes them, at a learning rate out of all reason."""
    good = [line for line in (folder / "rows.jsonl").read_text().splitlines() if str(POISON) not in line]
    (folder / "good.jsonl").write_text("\n".join(good) + "\n")
    reckless = {"data": folder / "good.jsonl", "learning_rate": 1e38, "warmup_steps": 0, "max_steps": 1}
    for output, more in (("unsaved", {"save_strategy": "steps", "save_steps": 1}), ("unexported", {})):
        said = launch_many(folder, 2, [command(folder, (1, 1, 1), output, **reckless, **more)], code=2)
        assert "the weights are not finite any more (" in said and "Traceback" not in said
        assert not list((folder / output).glob("checkpoint-*")) and not (folder / output / "model").exists()


def test_nothing_to_hope_for():
    """As many steps left out one after another as say that the run is lost; one good step among them forgives."""
    steps = NonFiniteSteps("skip")
    for step in range(2 * IN_A_ROW - 1):
        steps.note(["rows.jsonl:1"], torch.full((1, 4), torch.nan))
        steps.close(applied=step == IN_A_ROW - 1, step=step, scaled=False)
    assert steps.in_a_row == IN_A_ROW - 1
    steps.note(["rows.jsonl:1"], torch.full((1, 4), torch.nan))
    with pytest.raises(UserError, match=rf"rows\.jsonl:1 is not finite\. {IN_A_ROW} consecutive steps were skipped"):
        steps.close(applied=False, step=2 * IN_A_ROW, scaled=False)


def test_loss_scaling_leaves_steps_out_by_design():
    steps = NonFiniteSteps("stop")
    steps.note(["rows.jsonl:1"], torch.zeros(1, 4))
    steps.close(applied=False, step=1, scaled=True)
    assert steps.skipped == 0
    steps.note(["rows.jsonl:1"], torch.full((1, 4), torch.inf))
    with pytest.raises(UserError, match="is not finite"):
        steps.close(applied=False, step=2, scaled=True)
