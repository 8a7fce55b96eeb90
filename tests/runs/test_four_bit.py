"""A base in 4 bits, kept by bitsandbytes for real: the same losses and adapter over two ranks, a resume, and peft."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from launch.common.library_patches import keep_4bit_weights
from launch.model.four_bit import quantization
from tests.support.small_run import flags, launch_many, metrics, write_data, write_model

pytest.importorskip("bitsandbytes")
COMMON = {
    "load_in_4bit": True,
    "lora_rank": 4,
    "smoothing": 0.1,
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_steps": 4,
    "logging_steps": 1,
    "eval_strategy": "no",
    "max_length": 96,
    "samples": 1,
    "save_steps": 2,
}
RUNS = {"one": (1, 0, {}), "dp2-zero2": (2, 2, {}), "one-dora": (1, 1, {"dora": True})}  # ranks, ZeRO stage, more


def arguments(folder: Path, name: str, output: str = "") -> list[str]:
    ranks, zero, more = RUNS[name]
    places = {"model": folder / "model-untied", "data": folder / "train.jsonl"}
    places |= {"output_dir": folder / (output or name)}
    return flags(COMMON | places | more | {"zero": zero, "per_device_train_batch_size": 8 // ranks})


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("four-bit")
    write_data(folder)
    write_model(folder, tied=False)
    for ranks in (1, 2):
        launch_many(folder, ranks, [arguments(folder, name) for name, run in RUNS.items() if run[0] == ranks])
    return folder


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/adapter_model.safetensors")


def test_two_ranks_train_the_adapter_of_one(runs):
    for one, two in zip(metrics(runs / "one"), metrics(runs / "dp2-zero2"), strict=True):
        for key in ("loss", "nll", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-5), (key, one["step"])
    want, have = adapter(runs / "one"), adapter(runs / "dp2-zero2")
    assert want.keys() == have.keys()
    for key, weight in want.items():
        assert (have[key] - weight).abs().max() <= 1e-5 * weight.abs().max(), key


@pytest.mark.parametrize("name", RUNS)
def test_it_learns_and_peft_puts_it_on_the_base_in_4_bits(runs, name):
    losses = [row["loss"] for row in metrics(runs / name)]
    assert losses[-1] < losses[0] - 0.05
    loaded = AutoModelForCausalLM.from_pretrained(
        runs / "model-untied", quantization_config=quantization(torch.float32)
    ).eval()
    keep_4bit_weights(loaded)
    kinds = {type(module).__name__ for module in loaded.model.layers.modules() if hasattr(module, "in_features")}
    assert kinds == {"Linear4bit"}
    ids = torch.tensor([[5, 9, 17, 33, 2, 40, 8]])
    with torch.no_grad():
        before = loaded(input_ids=ids).logits
        after = PeftModel.from_pretrained(loaded, runs / name / "model").eval()(input_ids=ids).logits
    assert (after - before).abs().max() > 0.01


def test_it_resumes_bit_for_bit(runs):
    torn = runs / "torn"
    shutil.copytree(runs / "one", torn)
    shutil.rmtree(torn / "model")
    shutil.rmtree(torn / "checkpoint-4")
    printed = launch_many(runs, 1, [arguments(runs, "one", "torn")])
    assert "checkpoint-2" in printed
    before, after = adapter(runs / "one"), adapter(torn)
    assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)
