"""One process, two tensor-parallel and two data-parallel ranks: the same losses and the same exported model.

Real processes under the real launcher with real DeepSpeed engines, from one saved checkpoint each: ZeRO 0 to 3,
tied and untied embeddings, any accumulation, a vocabulary that does not divide.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from launch.data.tokenization import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
VOCAB = 403  # odd: two ranks hold 202 and 201 columns
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
}

# ranks, tensor parallelism, accumulation, ZeRO stage, extra
ALONE = (1, 1, 1, 0, "")
SETUPS = [
    ALONE,
    (1, 1, 4, 1, ""),
    (1, 1, 1, 0, "--head dense"),
    (2, 1, 1, 0, ""),
    (2, 1, 2, 1, ""),
    (2, 1, 1, 2, ""),
    (2, 1, 2, 3, ""),
    (2, 2, 1, 0, ""),
    (2, 2, 2, 1, ""),
    (2, 2, 1, 2, ""),
    (2, 2, 2, 3, ""),
    (2, 2, 1, 1, "--head dense"),
    (2, 2, 1, 1, "--head sharded"),
    (4, 2, 1, 1, ""),
    (4, 2, 2, 3, ""),
]


def name(setup, tied: bool) -> str:
    ranks, tp, accumulation, zero, extra = setup
    label = f"ranks{ranks}-tp{tp}-accumulate{accumulation}-zero{zero}{extra.replace('--head ', '-')}"
    return label + ("-tied" if tied else "")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """All runs, done once: four launches, by number of ranks and tensor parallelism."""
    folder = tmp_path_factory.mktemp("runs")
    _write_data(folder)
    for tied in (False, True):
        _write_model(folder, tied)
    for ranks, tp in ((1, 1), (2, 1), (2, 2), (4, 2)):
        todo = [(s, tied) for s in SETUPS if s[:2] == (ranks, tp) for tied in (False, True)]
        _launch(folder, ranks, [_arguments(folder, *what) for what in todo])
    return folder


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("setup", SETUPS[1:], ids=lambda s: name(s, False))
def test_same_losses_and_same_model(runs, setup, tied):
    alone, other = runs / name(ALONE, tied), runs / name(setup, tied)
    expected, got = _metrics(alone), _metrics(other)
    assert [row["step"] for row in got] == [row["step"] for row in expected]
    for want, have in zip(expected, got, strict=True):
        assert have.keys() == want.keys()
        for key in want.keys() & {"loss", "nll", "eval_nll", "accuracy", "grad_norm"}:
            assert have[key] == pytest.approx(want[key], rel=1e-5), (key, want["step"])
        for key in want.keys() & {"label_tokens", "eval_label_tokens"}:
            assert have[key] == want[key]
    expected, got = (load_file(run / "model" / "model.safetensors") for run in (alone, other))
    assert got.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(got[key], weight, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_export_loads_and_is_what_was_trained(runs, tied):
    run = runs / name((2, 2, 2, 3, ""), tied)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert model.lm_head.weight.shape == (VOCAB, 64)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    before = AutoModelForCausalLM.from_pretrained(runs / ("model-tied" if tied else "model-untied"))
    assert not torch.equal(before.lm_head.weight, model.lm_head.weight)
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    prompt = tokenizer(sample["prompt"], return_tensors="pt", add_special_tokens=False).input_ids
    bos = torch.tensor([[tokenizer.bos_token_id]])
    output = model.generate(torch.cat([bos, prompt], 1), max_new_tokens=48, do_sample=False)
    assert tokenizer.decode(output[0, 1 + prompt.shape[1] :], skip_special_tokens=True) == sample["completion"]


def test_loss_is_smoothed_and_nll_is_not(runs):
    rows = [row for row in _metrics(runs / name(ALONE, False)) if "loss" in row]
    assert all(row["loss"] != pytest.approx(row["nll"], rel=1e-4) for row in rows)
    assert {"step", "loss", "nll", "accuracy", "grad_norm", "lr", "label_tokens"} <= rows[0].keys()
    assert {"tokens_per_second", "peak_memory_gib"} <= rows[0].keys()


def _metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


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
        "per_device_train_batch_size": GLOBAL_BATCH // accumulation // (ranks // tp),
    }
    return [*extra.split(), *(word for key, value in values.items() for word in (f"--{key}", str(value)))]


def _launch(folder: Path, ranks: int, todo: list[list[str]]) -> None:
    (folder / "todo.json").write_text(json.dumps(todo))
    launcher = Path(sys.executable).with_name("deepspeed")
    port = random.randint(20000, 40000)
    done = subprocess.run(
        [
            launcher,
            f"--num_gpus={ranks}",
            f"--master_port={port}",
            ROOT / "tests" / "run_many.py",
            folder / "todo.json",
        ],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"PATH": f"{launcher.parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def _write_data(folder: Path) -> None:
    """Sums in words, of unequal length, so that micro-batches hold unequal numbers of label tokens."""
    draw = random.Random(0)
    for split, count in (("train", 40), ("heldout", 7)):
        rows = []
        for _ in range(count):
            terms = [draw.randint(1, 99) for _ in range(draw.randint(2, 6))]
            steps = " ".join(f"Add {term} to get {sum(terms[: i + 1])}." for i, term in enumerate(terms))
            question = f"What is {' + '.join(map(str, terms))}?"
            rows.append({"question": question, "answer": f"{steps} #### {sum(terms)}"})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_model(folder: Path, tied: bool) -> None:
    texts = [" ".join(json.loads(line).values()) for line in (folder / "train.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(texts, 310)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    path = folder / ("model-tied" if tied else "model-untied")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
