"""Every kind of model that is split over two ranks trains as on one process: losses, gradient norms and weights.

So do its adapters, which are split as the layers beside them.

All ranks' runs are done in one start, since a start costs more than a run. By default a few kinds stand for all:
`make kinds` runs every one.
"""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.kinds import KINDS, write_kind
from tests.support.small_run import VOCAB, flags, launch_many, metrics, write_data, write_model

ALL = bool(os.environ.get("ALL_KINDS"))
# a sum of gradients over ranks, fused and gathered layers, persistent buffers, a scaled embedding, the head alone
FEW = ("qwen3_moe", "phi3", "deepseek_v3", "gemma2", "bloom")
CHOSEN = tuple(KINDS) if ALL else FEW
# fused and gathered layers, a frozen sum of gradients, biases, Conv1D in a model of which the head alone is split
ADAPTED = KINDS if ALL else ("phi3", "qwen3_moe", "starcoder2", "gpt2")
EXPERTS = ("deepseek_v3", "mixtral", "qwen3_moe")  # to which peft gives no DoRA
ADAPTERS = [(kind, dora) for kind in ADAPTED for dora in (False, True) if not dora or kind not in EXPERTS]
LORA = {"lora_rank": 4, "lora_alpha": 32}
CHANGE_LOGITS = ("cohere", "gptj")  # or have a bias: refused by the fused head
COMMON = {
    "smoothing": 0.1,
    "optim": "sgd",  # Adam would forgive a gradient that is wrong by a factor
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_steps": 3,
    "logging_steps": 1,
    "per_device_train_batch_size": 8,
    "eval_strategy": "no",
    "max_length": 96,
    "samples": 0,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    write_data(folder)
    tokenizer = AutoTokenizer.from_pretrained(write_model(folder, tied=False))
    for kind in {*CHOSEN, *(kind for kind, _ in ADAPTERS)}:
        write_kind(kind, tokenizer, folder, VOCAB)
    for tp in (1, 2):
        todo = [(kind, kind, {}) for kind in CHOSEN]
        todo += [(kind, _adapter(kind, dora), LORA | {"dora": dora}) for kind, dora in ADAPTERS]
        launch_many(folder, tp, [_arguments(folder, tp, *each) for each in todo])
    return folder


def _adapter(kind: str, dora: bool) -> str:
    return f"{kind}-{'dora' if dora else 'lora'}"


def _arguments(folder: Path, tp: int, kind: str, name: str, adapter: dict) -> list[str]:
    places = {"model": folder / kind, "data": folder / "train.jsonl", "output_dir": folder / f"{name}-tp{tp}"}
    head = "sharded" if kind in CHANGE_LOGITS else "fused"
    return flags(COMMON | places | adapter | {"tp": tp, "head": head})


def _weights(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(folder / name)


def _assert_same_losses(split: Path, alone: Path) -> None:
    expected, got = metrics(alone), metrics(split)
    assert [row["step"] for row in got] == [row["step"] for row in expected] == [1, 2, 3]
    for want, have in zip(expected, got, strict=True):
        for key in ("loss", "nll", "accuracy", "grad_norm"):
            assert have[key] == pytest.approx(want[key], rel=1e-5), (key, want["step"])


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", CHOSEN)
def test_two_ranks_train_as_one_process(runs, kind):
    alone, split = runs / f"{kind}-tp1", runs / f"{kind}-tp2"
    _assert_same_losses(split, alone)
    before, expected, got = _weights(runs / kind), _weights(alone / "model"), _weights(split / "model")
    assert got.keys() == expected.keys()
    size = max((expected[name] - before[name]).norm() for name in before.keys() & expected.keys())
    for name, weight in expected.items():
        torch.testing.assert_close(
            got[name], weight, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        if name in before:  # weights change by little in three steps: hold the change itself to one process's
            error = (got[name] - weight).norm()
            assert error <= 1e-4 * (weight - before[name]).norm() + 1e-6 * size, name


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("kind", "dora"), ADAPTERS, ids=[_adapter(*each) for each in ADAPTERS])
def test_two_ranks_train_the_adapter_of_one_process(runs, kind, dora):
    """A and magnitudes change by little, B, which begins as zero, by all of it."""
    alone, split = (runs / f"{_adapter(kind, dora)}-tp{tp}" for tp in (1, 2))
    _assert_same_losses(split, alone)
    expected, got = (_weights(run / "model", "adapter_model.safetensors") for run in (alone, split))
    assert got.keys() == expected.keys()
    size = max(weight.norm() for name, weight in expected.items() if "lora_B" in name)
    for name, weight in expected.items():
        bound = 1e-4 * weight.norm() + 1e-6 * size if "lora_B" in name else 1e-6 * weight.norm()
        assert (got[name] - weight).norm() <= bound, name


@pytest.mark.parametrize("kind", CHOSEN)
def test_exports_are_whole(runs, kind):
    """With persistent buffers, which DeepSeek-V3's routers have."""
    model, found = AutoModelForCausalLM.from_pretrained(runs / f"{kind}-tp2" / "model", output_loading_info=True)
    assert not any(found[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    other = AutoModelForCausalLM.from_pretrained(runs / f"{kind}-tp1" / "model")
    ids = torch.arange(5, 45).unsqueeze(0)
    with torch.no_grad():
        logits, expected = (each.eval()(input_ids=ids).logits for each in (model, other))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
