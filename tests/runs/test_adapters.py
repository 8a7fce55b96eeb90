"""LoRA and DoRA: the same losses and adapter for every layout over ranks, which peft loads; resume; merging.

One process, data parallel, tensor parallel, and both; ZeRO 0 to 3.
"""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.support.small_run import flags, launch_many, metrics, write_data, write_model

GLOBAL_BATCH = 8
NOTHING_FROZEN = """
from accelerate import Accelerator
def get_state_dict(*_): raise AssertionError("the frozen model is gathered for a checkpoint")
Accelerator.get_state_dict = get_state_dict
"""
COMMON = {
    "smoothing": 0.1,
    "optim": "sgd",  # as in test_runs_agree
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_steps": 4,
    "logging_steps": 1,
    "eval_strategy": "no",
    "eval_on_start": False,
    "max_length": 96,
    "samples": 0,
    "save_strategy": "no",
    "lora_rank": 4,
    "lora_alpha": 32,
}
DORA = {"dora": True}
DROPOUT = {"lora_dropout": 0.3}
SAVED = {"save_strategy": "steps", "save_steps": 2}
MERGED = {"merge_adapter": True}
# name: ranks, tensor parallelism, ZeRO stage, whether embeddings are tied, more
RUNS = {
    "one": (1, 1, 0, False, {}),
    "one-tied": (1, 1, 1, True, {}),
    "one-dora": (1, 1, 0, False, DORA),
    "one-dropout": (1, 1, 0, False, DROPOUT),
    "one-dora-dropout": (1, 1, 0, False, DORA | DROPOUT),
    "one-merged": (1, 1, 1, False, MERGED | {"gradient_checkpointing": True}),
    "one-dora-merged": (1, 1, 2, False, DORA | MERGED),
    "one-resumed": (1, 1, 1, False, SAVED),
    "dp2-zero0": (2, 1, 0, False, {}),
    "dp2-zero1": (2, 1, 1, False, {}),
    "dp2-zero2": (2, 1, 2, False, {}),
    "dp2-zero3": (2, 1, 3, False, {}),
    "dp2-dora-zero2": (2, 1, 2, False, DORA),
    "dp2-dora-zero3": (2, 1, 3, False, DORA),
    "dp2-tied-merged-zero3": (2, 1, 3, True, MERGED),
    "tp2-zero0": (2, 2, 0, False, {}),
    "tp2-zero1-resumed": (2, 2, 1, False, SAVED),
    "tp2-zero2": (2, 2, 2, False, {}),
    "tp2-zero3": (2, 2, 3, False, {}),
    "tp2-tied-merged-zero1": (2, 2, 1, True, MERGED),
    "tp2-dora-zero1-resumed": (2, 2, 1, False, DORA | SAVED),
    "tp2-dora-merged-zero0": (2, 2, 0, False, DORA | MERGED),
    "tp2-dora-zero3": (2, 2, 3, False, DORA),
    "tp2-dropout-zero2": (2, 2, 2, False, DROPOUT),
    "tp2-dora-dropout-zero1": (2, 2, 1, False, DORA | DROPOUT | {"gradient_checkpointing": True}),
    "tp2-dp2-dora-zero2": (4, 2, 2, False, DORA),
    "tp2-dp2-zero1": (4, 2, 1, False, {}),
    "tp2-dp2-tied-merged-zero3": (4, 2, 3, True, MERGED),
}


def arguments(folder: Path, name: str, **more) -> list[str]:
    ranks, tp, zero, tied, values = RUNS[name]
    places = {"model": folder / ("model-tied" if tied else "model-untied"), "data": folder / "train.jsonl"}
    size = {"zero": zero, "tp": tp, "per_device_train_batch_size": GLOBAL_BATCH * tp // ranks}
    size |= {"output_dir": folder / name}
    return flags(COMMON | places | size | values | more)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_data(folder)
    for tied in (False, True):
        write_model(folder, tied)
    for layout in sorted({run[:2] for run in RUNS.values()}):  # one start holds runs of one layout
        launch_many(folder, layout[0], [arguments(folder, name) for name, run in RUNS.items() if run[:2] == layout])
    return folder


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "adapter_model.safetensors")


def logits(model, ids=((5, 9, 17, 33, 2, 40, 8),)) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(ids)).logits


def base(folder: Path, tied: bool = False):
    return AutoModelForCausalLM.from_pretrained(folder / ("model-tied" if tied else "model-untied"))


def assert_same_losses(run: Path, alone: Path) -> None:
    want, have = ([row for row in metrics(path) if "loss" in row] for path in (alone, run))
    assert len(want) == len(have) == COMMON["max_steps"]
    for one, other in zip(want, have, strict=True):
        for key in ("loss", "nll", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-5), (key, one["step"])


PAIRS = [
    (name, "-".join(["one", *(kind for kind in ("dora", "dropout") if kind in name)]))
    for name, run in RUNS.items()
    if run[0] > 1 and "merged" not in name
]


@pytest.mark.parametrize(("name", "alone"), PAIRS)
def test_same_losses_and_same_adapter(runs, name, alone):
    assert_same_losses(runs / name, runs / alone)
    want, have = adapter(runs / alone), adapter(runs / name)
    assert have.keys() == want.keys()
    for key, weight in want.items():
        torch.testing.assert_close(
            have[key], weight, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize(
    ("name", "merged"),
    [
        ("one", "one-merged"),
        ("one-dora", "one-dora-merged"),
        ("one-dora", "tp2-dora-merged-zero0"),
        ("one-tied", "dp2-tied-merged-zero3"),
        ("one-tied", "tp2-tied-merged-zero1"),
        ("one-tied", "tp2-dp2-tied-merged-zero3"),
    ],
)
def test_peft_loads_what_was_trained(runs, name, merged):
    """The adapter on the base computes what the merged model of the same run does."""
    tied = "tied" in name
    adapted = PeftModel.from_pretrained(base(runs, tied), runs / name / "model")
    whole = AutoModelForCausalLM.from_pretrained(runs / merged / "model")
    assert_same_losses(runs / merged, runs / name)
    assert not (runs / merged / "model" / "adapter_config.json").exists()
    assert (whole.lm_head.weight is whole.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits(whole), logits(adapted), rtol=1e-4, atol=1e-5)
    difference = (logits(adapted) - logits(base(runs, tied))).abs().max()
    assert difference > 0.1


def test_only_the_adapter_is_trained_and_exported(runs):
    """14 linear layers of two blocks; transformers finds the base by the adapter's configuration."""
    weights = adapter(runs / "one")
    assert len(weights) == 28 and not any("lm_head" in name for name in weights)
    assert {weight.shape[0 if "lora_A" in name else 1] for name, weight in weights.items()} == {4}
    assert sorted(path.name for path in (runs / "one/model").iterdir() if "token" not in path.name) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
    ]
    adapted = PeftModel.from_pretrained(base(runs), runs / "one/model")
    for loader in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        torch.testing.assert_close(logits(loader.from_pretrained(runs / "one/model")), logits(adapted))
    assert GenerationConfig.from_pretrained(runs / "one/model").label_smoothing == COMMON["smoothing"]
    card = ModelCard.load(runs / "one/model/README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", None)  # a path is no name on the hub
    assert "LoRA of rank 4" in card.text and "--lora-modules tuned=MODEL" in card.text
    whole = AutoModelForCausalLM.from_pretrained(runs / "one-merged/model")
    assert torch.equal(whole.lm_head.weight, base(runs).lm_head.weight)


@pytest.mark.parametrize("name", ["one-resumed", "tp2-zero1-resumed", "tp2-dora-zero1-resumed"])
def test_resume_is_exact(runs, name):
    """A checkpoint holds no frozen weight, and the run goes on from it to the same adapter, bit for bit."""
    run = runs / name
    checkpoint = run / "checkpoint-2"
    small = sum(path.stat().st_size for path in checkpoint.rglob("*model*"))
    assert small < (runs / "model-untied/model.safetensors").stat().st_size
    before = adapter(run)
    (run / "model").rename(run / "model-before")
    (run / "checkpoint-4").rename(run / "set-aside")
    printed = launch_many(runs, RUNS[name][0], [arguments(runs, name)] * 2, before=NOTHING_FROZEN)
    assert "checkpoint-2" in printed and "is finished" in printed
    if name == "one-resumed":
        _refuses_another_base(runs, run)
    after = adapter(run)
    assert after.keys() == before.keys() and all(torch.equal(after[key], weight) for key, weight in before.items())


def _refuses_another_base(runs: Path, run: Path) -> None:
    """Another model at the place of the one that the adapter was trained beside."""
    held = runs / "model-untied" / "model.safetensors"
    whole = held.read_bytes()
    save_file({key: weight * 1.01 for key, weight in load_file(held).items()}, held, {"format": "pt"})
    again = runs / "another-base"
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("model", "model-before", "set-aside", "checkpoint-4"))
    printed = launch_many(runs, 1, [arguments(runs, "one-resumed", output_dir=again)], code=2)
    assert "the weights or the configuration of --model differ" in printed and "Traceback" not in printed
    held.write_bytes(whole)
