"""What the tests that start runs share: a model of a few thousand weights, its data, and runs to their end."""

import itertools
import json
import random
import subprocess
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launch.data.train_tokenizer import train_tokenizer
from tests.support.forked import ForkedRuns
from tests.support.processes import ROOT, environment, launcher

VOCAB = 403  # odd: two ranks hold 202 and 201 columns
LIMIT_SECONDS = 600
_STARTS = itertools.count()


def flags(values: dict) -> list[str]:
    """`{"tp": 2}` as `["--tp", "2"]`."""
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def launch_many(
    folder: Path,
    ranks: int,
    todo: list[list[str]],
    code: int = 0,
    file_bytes: int | None = None,
    before: str = "",
) -> str:
    """Run `launch/sft.py`'s main for each argument list, in one set of forked ranks; what they printed.

    `file_bytes`: no file may grow larger, which fails as a full disk does. `before`: Python that all ranks run first.
    """
    log = folder / f"launched-{next(_STARTS)}.log"
    runs = ForkedRuns(ranks, todo, log, file_bytes=file_bytes, before=before)
    try:
        runs.wait(LIMIT_SECONDS)
    finally:
        runs.end()
    printed = log.read_text()
    assert runs.returncode == code, printed[-6000:]
    return printed


def launch_with_deepspeed(folder: Path, ranks: int, todo: list[list[str]]) -> None:
    """As `launch_many`, under the launcher that a user has, in processes of their own."""
    (folder / "todo.json").write_text(json.dumps(todo))
    done = subprocess.run(
        [*launcher(ranks), str(ROOT / "tests" / "support" / "run_many.py"), str(folder / "todo.json")],
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        env=environment(),
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


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
