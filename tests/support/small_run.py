"""What the tests that start real runs share: a model of a few thousand weights, its data, and the launcher."""

import contextlib
import json
import os
import random
import resource
import socket
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launch.data.train_tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 403  # odd: two ranks hold 202 and 201 columns


def launcher(ranks: int) -> list[str]:
    """The deepspeed launcher for so many ranks of this machine; a script and its arguments follow."""
    return [str(Path(sys.executable).with_name("deepspeed")), f"--num_gpus={ranks}", f"--master_port={free_port()}"]


def free_port() -> int:
    """A port of this machine that nobody listens on, below those that connections are given."""
    while True:
        port = random.randint(10000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def environment() -> dict[str, str]:
    """One thread a rank, and this Python first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}


def flags(values: dict) -> list[str]:
    """`{"tp": 2}` as `["--tp", "2"]`."""
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def launch_many(folder: Path, ranks: int, todo: list[list[str]], code: int = 0, file_bytes: int | None = None) -> str:
    """Run `launch/sft.py`'s main for each argument list, in one set of processes; what they printed.

    `file_bytes`: no file may grow larger, which fails as a full disk does.
    """
    limits = (file_bytes, file_bytes)
    (folder / "todo.json").write_text(json.dumps(todo))
    done = subprocess.run(
        [*launcher(ranks), str(ROOT / "tests" / "support" / "run_many.py"), str(folder / "todo.json")],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment(),
        preexec_fn=None if file_bytes is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    )
    assert done.returncode == code, (done.stdout + done.stderr)[-6000:]
    return done.stdout + done.stderr


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write_data(folder: Path) -> None:
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


def write_model(folder: Path, tied: bool, **config) -> Path:
    texts = [" ".join(json.loads(line).values()) for line in (folder / "train.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(texts, 310)
    torch.manual_seed(0)
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(LlamaConfig(**values | config))
    path = folder / ("model-tied" if tied else "model-untied")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
