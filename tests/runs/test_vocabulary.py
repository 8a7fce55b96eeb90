"""Models whose vocabulary is not as it seems train on every layout as on one process, and their exports reload.

One has two matrices where its configuration ties them, one has fewer rows than its tokenizer, which ties them.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.small_run import flags, launch_many, metrics, write_data, write_model

COMMON = {
    "smoothing": 0.1,
    "optim": "sgd",
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_steps": 3,
    "logging_steps": 1,
    "eval_strategy": "no",
    "max_length": 96,
    "samples": 0,
    "save_strategy": "no",
}
# ranks, tensor parallelism, ZeRO stage
ALONE = (1, 1, 0)
LAYOUTS = [(2, 1, 3), (2, 2, 1), (2, 2, 3)]
MODELS = ("two-matrices", "larger-tokenizer")


def name(model: str, layout: tuple) -> str:
    return f"{model}-{'-'.join(map(str, layout))}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    write_data(folder)
    write_model(folder, tied=False).rename(folder / "two-matrices")
    config = json.loads((folder / "two-matrices/config.json").read_text())
    (folder / "two-matrices/config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    size = len(AutoTokenizer.from_pretrained(folder / "two-matrices"))
    larger = write_model(folder, tied=True, vocab_size=size).rename(folder / "larger-tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(larger)
    tokenizer.add_tokens(["Add", "get", "What is"])  # they are in the rows
    tokenizer.save_pretrained(larger)
    for ranks, tp in ((1, 1), (2, 1), (2, 2)):
        layouts = [layout for layout in (ALONE, *LAYOUTS) if layout[:2] == (ranks, tp)]
        launch_many(folder, ranks, [_arguments(folder, model, layout) for layout in layouts for model in MODELS])
    return folder


def _arguments(folder: Path, model: str, layout: tuple) -> list[str]:
    ranks, tp, zero = layout
    own = {"model": folder / model, "data": folder / "train.jsonl", "output_dir": folder / name(model, layout)}
    own |= {"tp": tp, "zero": zero, "per_device_train_batch_size": 8 // (ranks // tp)}
    return flags(COMMON | own | {"resize_embeddings": model == "larger-tokenizer"})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_same_losses_and_same_model(runs, model, layout):
    alone, other = runs / name(model, ALONE), runs / name(model, layout)
    for want, have in zip(metrics(alone), metrics(other), strict=True):
        for key in ("loss", "nll", "grad_norm"):
            assert have[key] == pytest.approx(want[key], rel=1e-5), (key, want["step"])
    expected, got = (load_file(run / "model/model.safetensors") for run in (alone, other))
    assert got.keys() == expected.keys() and ("lm_head.weight" in got) == (model == "two-matrices")
    for key, weight in expected.items():
        torch.testing.assert_close(got[key], weight, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("model", MODELS)
def test_the_export_reloads_as_it_was_trained(runs, model):
    path = runs / name(model, (2, 2, 3)) / "model"
    loaded, found = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == loaded.config.tie_word_embeddings == (model == "larger-tokenizer")
    weights = load_file(path / "model.safetensors")
    assert torch.equal(loaded.lm_head.weight, weights["model.embed_tokens.weight" if tied else "lm_head.weight"])
    assert len(AutoTokenizer.from_pretrained(path)) <= loaded.config.vocab_size
