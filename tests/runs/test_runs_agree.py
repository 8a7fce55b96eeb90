"""One process, two tensor-parallel and two data-parallel ranks: the same losses and the same exported model.

Real DeepSpeed engines, from one saved checkpoint each: ZeRO 0 to 3, optimizer and weights on the CPU, tied and untied
embeddings, any accumulation, a vocabulary that does not divide; a counted prior and a z-loss, which the dense head
does not have. Two tensor-parallel ranks are started by deepspeed's launcher, the others are forked.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from smoothing.hf import UnsmoothLogits
from tests.support.data import prepared
from tests.support.small_run import (
    VOCAB,
    flags,
    launch_many,
    launch_with_deepspeed,
    metrics,
    write_data,
    write_model,
)

GLOBAL_BATCH = 8
# plain gradient descent: Adam would forgive a gradient that is wrong by a factor
COMMON = {
    "smoothing": 0.1,
    "optim": "sgd",
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_steps": 4,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "per_device_eval_batch_size": 3,
    "max_length": 96,
    "samples": 1,
    "save_strategy": "no",
}

EXTRAS = {"smoothing_prior": "unigram", "z_loss": 1e-2}
# ranks, tensor parallelism, accumulation, ZeRO stage, extra
ALONE = (1, 1, 1, 0, "")  # what the others are held to, those without EXTRAS to PLAIN
PLAIN = (1, 1, 1, 0, "--smoothing_prior uniform")
SETUPS = [
    PLAIN,
    ALONE,
    (1, 1, 4, 1, ""),
    (1, 1, 1, 0, "--head dense"),
    (2, 1, 1, 0, ""),
    (2, 1, 2, 1, ""),
    (2, 1, 1, 2, ""),
    (2, 1, 2, 3, ""),
    (2, 1, 1, 3, "--offload true"),
    (2, 2, 1, 0, ""),
    (2, 2, 2, 1, ""),
    (2, 2, 1, 2, ""),
    (2, 2, 2, 3, ""),
    (2, 2, 1, 1, "--head dense"),
    (2, 2, 1, 1, "--head sharded"),
    (4, 2, 1, 1, ""),
    (4, 2, 2, 3, ""),
]
BF16 = [
    (1, 1, 1, 1, "--bf16 true"),
    (2, 1, 2, 2, "--bf16 true"),
    (2, 2, 1, 1, "--bf16 true"),
    (2, 2, 2, 3, "--bf16 true"),
    (2, 2, 1, 2, "--bf16 true --head dense"),
]


def has_extras(setup) -> bool:
    return "dense" not in setup[-1] and "uniform" not in setup[-1]


def alone(setup) -> tuple:
    return ALONE if has_extras(setup) else PLAIN


def name(setup, tied: bool) -> str:
    ranks, tp, accumulation, zero, extra = setup
    more = "".join(f"-{word.strip('-')}" for word in extra.split() if not word.startswith("--head"))
    return f"ranks{ranks}-tp{tp}-accumulate{accumulation}-zero{zero}{more}" + ("-tied" if tied else "")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """All runs, done once: a start for each number of ranks and tensor-parallel ones, and for each dtype."""
    folder = tmp_path_factory.mktemp("runs")
    write_data(folder)
    for tied in (False, True):
        write_model(folder, tied)
    for setups in (SETUPS, BF16):
        for ranks, tp in sorted({setup[:2] for setup in setups}):
            todo = [(s, tied) for s in setups if s[:2] == (ranks, tp) for tied in (False, True)]
            launch = launch_with_deepspeed if (ranks, tp, setups) == (2, 2, SETUPS) else launch_many
            launch(folder, ranks, [_arguments(folder, *what) for what in todo])
    return folder


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("setup", SETUPS[2:], ids=lambda s: name(s, False))
def test_same_losses_and_same_model(runs, setup, tied):
    reference, other = runs / name(alone(setup), tied), runs / name(setup, tied)
    expected, got = metrics(reference), metrics(other)
    assert [row["step"] for row in got] == [row["step"] for row in expected]
    for want, have in zip(expected, got, strict=True):
        assert have.keys() == want.keys()
        for key in want.keys() & {"loss", "nll", "z_loss", "eval_nll", "accuracy", "grad_norm"}:
            assert have[key] == pytest.approx(want[key], rel=1e-5), (key, want["step"])
        for key in want.keys() & {"label_tokens", "tokens", "eval_label_tokens"}:
            assert have[key] == want[key]
    expected, got = (load_file(run / "model" / "model.safetensors") for run in (reference, other))
    assert got.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(got[key], weight, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("setup", BF16, ids=lambda s: name(s, False))
def test_bf16_stays_where_fp32_is(runs, setup, tied):
    """With gathered logits and `F.cross_entropy` among them, which are as far from it."""
    reference = metrics(runs / name(alone(setup), tied))
    for want, have in zip(reference, metrics(runs / name(setup, tied)), strict=True):
        assert have.keys() == want.keys()
        for key, bound in {"loss": 1e-3, "nll": 1e-3, "z_loss": 1e-3, "eval_nll": 1e-3, "grad_norm": 5e-3}.items():
            if key in want:
                assert have[key] == pytest.approx(want[key], rel=bound), (key, want["step"])
        for key in want.keys() & {"label_tokens", "tokens", "eval_label_tokens"}:
            assert have[key] == want[key]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_export_loads_and_is_what_was_trained(runs, tied):
    run = runs / name((2, 2, 2, 3, ""), tied)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert model.lm_head.weight.shape == (VOCAB, 64) and model.config.label_smoothing == COMMON["smoothing"]
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    before = AutoModelForCausalLM.from_pretrained(runs / ("model-tied" if tied else "model-untied"))
    assert not torch.equal(before.lm_head.weight, model.lm_head.weight)
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    prompt = tokenizer(sample["prompt"], return_tensors="pt", add_special_tokens=False).input_ids
    bos = torch.tensor([[tokenizer.bos_token_id]])
    output = model.generate(torch.cat([bos, prompt], 1), max_new_tokens=48, do_sample=False)
    completed = output[0, 1 + prompt.shape[1] :]
    assert tokenizer.decode(completed, skip_special_tokens=True) == sample["completion"]
    with torch.no_grad():
        probable = model(output).logits[0, prompt.shape[1] : -1].softmax(-1).gather(1, completed[:, None])[:, 0]
    texts, sure = zip(*sample["tokens"], strict=True)
    assert "".join(texts).removesuffix(tokenizer.eos_token) == sample["completion"]
    assert list(sure) == pytest.approx(probable.tolist(), abs=1e-4)
    report = (run / "report.html").read_text()
    assert report.count("<figure>") >= 5 and report.count("<ruby") >= len(texts)


def test_the_prior_is_exported_with_its_model(runs, tied=False):
    run = runs / name((2, 2, 2, 3, ""), tied)
    prior = load_file(run / "smoothing_prior.safetensors")["smoothing_prior"]
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert torch.equal(UnsmoothLogits.of(model).prior, prior) and model.config.label_smoothing == 0.1
    counts = torch.zeros(VOCAB, dtype=torch.float64)
    rows = prepared(
        str(runs / "train.jsonl"), AutoTokenizer.from_pretrained(run / "model"), max_length=96, fraction=0.0
    )
    for labels in rows.train["labels"]:
        for label in labels[1:]:
            counts[label] += label != -100
    tokens = len(AutoTokenizer.from_pretrained(run / "model"))
    counts[:tokens] += 1
    torch.testing.assert_close(prior.double(), counts / counts.sum(), rtol=1e-6, atol=0)
    plain = runs / name(PLAIN, tied)
    assert not (plain / "model/smoothing_prior.safetensors").exists()
    assert UnsmoothLogits.of(AutoModelForCausalLM.from_pretrained(plain / "model")).prior is None


def test_loss_is_smoothed_and_nll_is_not(runs):
    plain, rows = ([row for row in metrics(runs / name(s, False)) if "loss" in row] for s in (PLAIN, ALONE))
    assert all(row["loss"] != pytest.approx(row["nll"], rel=1e-4) for row in plain)
    assert plain[0]["nll"] == rows[0]["nll"] and rows[0].keys() - plain[0].keys() == {"z_loss"}
    assert {"step", "loss", "nll", "accuracy", "grad_norm", "lr", "label_tokens", "tokens"} <= rows[0].keys()
    assert {"tokens_per_second", "peak_memory_gib"} <= rows[0].keys()


def _arguments(folder: Path, setup, tied: bool) -> list[str]:
    ranks, tp, accumulation, zero, extra = setup
    values = COMMON | {
        "model": folder / ("model-tied" if tied else "model-untied"),
        "data": folder / "train.jsonl",
        "eval_data": folder / "heldout.jsonl",
        "output_dir": folder / name(setup, tied),
        "tp": tp,
        "zero": zero,
        "gradient_accumulation_steps": accumulation,
        "no_report": setup != (2, 2, 2, 3, ""),
        "per_device_train_batch_size": GLOBAL_BATCH // accumulation // (ranks // tp),
    }
    return [*flags(values | (EXTRAS if has_extras(setup) else {})), *extra.split()]
