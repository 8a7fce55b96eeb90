"""Training runs on one GPU, a model of 1.2B weights: tokens a second, MFU, peak memory, the largest batch that fits.

    python benchmarks/gpu_training.py                 # part of `make bench-gpu`
    python benchmarks/gpu_training.py --device cpu    # a dry run with a small model, which writes nothing

Real starts of `deepspeed launch/sft.py`, at some 16,000 tokens a step: the heads taking turns on the same rows, each
row by itself and packed; and `transformers.Trainer` alone, with Liger's kernels where they are installed
(`gpu_trainer.py`). With `--sanity` that has to pass first (a minute and a half). With `--most N` each head is then
given ever more rows to a step, up to N, until memory runs out (some 25 starts). Rows are those of `--data`
(question/answer, as in GSM8K) or sums made up here. Writes `gpu-training.json` and `gpu-training.md` in
`benchmarks/results/`, anew after each part.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch
from gpu import Clock, versions

from launch.training.throughput import RATES

SCRIPT = str(HERE.parent / "launch" / "sft.py")
TRAINER = str(HERE / "gpu_trainer.py")
HEADS = ("fused", "dense")
PACKED = {"packing": "true", "max_length": 2048}
LARGE = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SMALL = LARGE | {
    "vocab_size": 5000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Speed:
    """One run, past its first lines."""

    tokens: float  # read, a second
    label_tokens: float  # learned, a second
    peak_gib: float

    def operations(self, model: dict) -> float:
        """Operations a second of the weights' products: the body for every token, the head for those learned."""
        hidden, layers = model["hidden_size"], model["num_hidden_layers"]
        keys = hidden * model["num_key_value_heads"] // model["num_attention_heads"]
        body = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * model["intermediate_size"])
        return 6 * (body * self.tokens + model["vocab_size"] * hidden * self.label_tokens)


ROW_TOKENS = 170  # of the rows made up here, about
NO_MEMORY = ("out of memory", "cublas_status_alloc_failed")


class OutOfMemory(Exception):
    """A run that needed more memory than the device has."""


@dataclass(frozen=True)
class Bench:
    """What every run of this benchmark has in common."""

    data: Path
    folder: Path
    model: dict

    def command(self, *start: str, **values) -> list[str]:
        common = {"model_config": json.dumps(self.model), "tokenizer_size": 4000, "data": self.data, "smoothing": 0.1}
        common |= {"bf16": "true", "max_length": 512, "eval_strategy": "no", "eval_on_start": "false", "samples": 0}
        return [
            *start,
            SCRIPT,
            *(word for key, value in (common | values).items() for word in (f"--{key}", str(value))),
        ]

    def sanity(self, rows: int) -> str:
        """The table of `--sanity`. Ends this benchmark if a check fails."""
        command = [*self.command(sys.executable, per_device_train_batch_size=rows), "--sanity"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"--sanity failed, so nothing is timed:\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def train(self, head: str, rows: int, steps: int, packed: bool = False) -> Speed:
        """A real start; packed, of as many tokens a step. Raises `OutOfMemory` if it was too large."""
        output = self.folder / "run"
        shutil.rmtree(output, ignore_errors=True)
        launcher = (str(Path(sys.executable).with_name("deepspeed")), *one_device())
        values = {"head": head, "per_device_train_batch_size": rows, "max_steps": steps, "output_dir": output}
        values |= {"logging_steps": 2, "save_strategy": "no"}
        if packed:
            values |= PACKED | {"per_device_train_batch_size": max(1, rows * ROW_TOKENS // PACKED["max_length"])}
        done = subprocess.run(self.command(*launcher, **values), capture_output=True, text=True)
        if done.returncode:
            output_text = done.stdout + done.stderr
            if any(words in output_text.lower() for words in NO_MEMORY):
                raise OutOfMemory
            raise SystemExit(f"{shlex.join(done.args)}\nended with {done.returncode}:\n{output_text[-4000:]}")
        return _speed([json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()])

    def trainer(self, rows: int, steps: int) -> tuple[str, Speed]:
        """`transformers.Trainer` alone, and what it is called. Raises `OutOfMemory` if it was too large."""
        command = [sys.executable, TRAINER, json.dumps(self.model), f"--rows={rows}", f"--steps={steps}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            if any(words in (done.stdout + done.stderr).lower() for words in NO_MEMORY):
                raise OutOfMemory
            raise SystemExit(f"{shlex.join(command)}\nended with {done.returncode}:\n{done.stderr[-4000:]}")
        speed = json.loads(done.stdout.splitlines()[-1])
        name = "transformers.Trainer" + (" with Liger" if speed.pop("liger") else "")
        return name, Speed(**speed)

    def largest(self, head: str, rows: int, most: int) -> int:
        """The most rows to a step that fit: doubled until they do not, then found between."""
        fits, trial = 0, rows
        while trial <= most and self._fits(head, trial):
            fits, trial = trial, 2 * trial
        fails = min(trial, most + 1)
        while fails - fits > max(1, fits // 8):
            trial = (fits + fails) // 2
            fits, fails = (trial, fails) if self._fits(head, trial) else (fits, trial)
        return fits

    def _fits(self, head: str, rows: int) -> bool:
        try:
            self.train(head, rows, steps=4)
            fits = True
        except OutOfMemory:
            fits = False
        print(f"{head}: {rows} rows {'fit' if fits else 'do not fit'}", flush=True)
        return fits


def one_device() -> list[str]:
    """Flags of the launcher, which with --num_gpus would not heed CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    return ["--include", f"localhost:{visible}"] if visible.isdigit() else ["--num_gpus=1"]


def _speed(lines: list[dict]) -> Speed:
    """Medians of the log's lines but the first ones, in which kernels are compiled and memory is found."""
    lines = lines[max(1, len(lines) // 3) :]
    tokens = statistics.median(line["tokens_per_second"] for line in lines)
    labels = statistics.median(line["tokens_per_second"] * line["label_tokens"] / line["tokens"] for line in lines)
    return Speed(tokens, labels, max(line["peak_memory_gib"] for line in lines))


def write_rows(path: Path, count: int) -> Path:
    """Questions and worked answers about as long as GSM8K's, two tokens in five of them answer."""
    draw, lines = random.Random(0), []
    for _ in range(count):
        name, terms = draw.choice(("Ada", "Ben", "Cleo", "Dan", "Eve")), draw.sample(range(2, 99), draw.randint(4, 9))
        days = "; ".join(f"on day {day + 1} {name} packs {term} boxes of apples" for day, term in enumerate(terms))
        steps = " ".join(f"Adding {term} gives {sum(terms[: i + 1])}." for i, term in enumerate(terms))
        question = f"A farm counts its boxes: {days}. How many boxes are there after {len(terms)} days?"
        lines.append(json.dumps({"question": question, "answer": f"{steps}\n#### {sum(terms)}"}) + "\n")
    path.write_text("".join(lines))
    return path


def product_rate(device: str, size: int) -> float:
    """Operations a second of one bf16 product of square matrices here."""
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    clock = Clock(device)
    clock.time(lambda: left @ right)
    return 2 * size**3 / (1e-3 * statistics.median(clock.time(lambda: left @ right) for _ in range(9)))


def compare(bench: Bench, rows: int, steps: int, rounds: int) -> dict[str, list[Speed]]:
    """Runs of every head on the same rows, taking turns, and of Trainer; none for what does not fit."""
    ways = [(head, packed) for packed in (False, True) for head in HEADS]
    speeds = {}
    for index in range(rounds):
        for head, packed in reversed(ways) if index % 2 else ways:
            name = f"{head}, packed" if packed else head
            try:
                speeds.setdefault(name, []).append(bench.train(head, rows, steps, packed))
                print(f"{name}: {speeds[name][-1]}", flush=True)
            except OutOfMemory:
                print(f"{name}: {rows} rows do not fit", flush=True)
        try:
            name, speed = bench.trainer(rows, steps)
            speeds.setdefault(name, []).append(speed)
            print(f"{name}: {speed}", flush=True)
        except OutOfMemory:
            print(f"transformers.Trainer: {rows} rows do not fit", flush=True)
    return speeds


def table(result: dict) -> str:
    peak = result["nominal"] or result["product_rate"]
    source = "as its maker states" if result["nominal"] else "as measured"
    lines = [
        f"# Training on one GPU: {json.dumps(result['model'])}, bf16",
        "",
        f"`{result['command']}`",
        "",
        f"{result['device']}; {', '.join(f'{k} {v}' for k, v in result['versions'].items() if v)}; {result['date']}. "
        f"A bf16 product runs at {result['product_rate'] / 1e12:.1f} TFLOP/s here. MFU: 6 operations for each weight "
        f"of a product and token (the head's for label tokens alone) against {peak / 1e12:.1f} TFLOP/s, {source}.",
        "",
        "| head | rows a step | tokens/s, median (least to most) | label tokens/s | MFU | peak GiB | rows that fit |",
        "|---|---|---|---|---|---|---|",
    ]
    for head, entries in result["speeds"].items():
        cells = ["does not fit", "", "", ""]
        if entries:
            tokens = [entry["tokens"] for entry in entries]
            spread = f"{statistics.median(tokens):,.0f} ({min(tokens):,.0f} to {max(tokens):,.0f})"
            labels = statistics.median(entry["label_tokens"] for entry in entries)
            mfu = statistics.median(Speed(**entry).operations(result["model"]) for entry in entries) / peak
            cells = [spread, f"{labels:,.0f}", f"{mfu:.1%}", f"{max(entry['peak_gib'] for entry in entries):.1f}"]
        lines.append(f"| {head} | {result['rows']} | {' | '.join(cells)} | {result['largest'].get(head, '')} |")
    return "\n".join(lines) + "\n"


def save(result: dict, dry: bool) -> None:
    """What there is by now."""
    if not dry:
        (HERE / "results" / "gpu-training.json").write_text(json.dumps(result, indent=1) + "\n")
        (HERE / "results" / "gpu-training.md").write_text(table(result))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--data", type=Path, default=None, help="question/answer rows; default: made up")
    parser.add_argument("--rows", type=int, default=96, help="to a step, where heads are compared")
    parser.add_argument("--most", type=int, default=0, help="rows to a step that are tried; 0: none")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sanity", action="store_true", help="which has to pass first")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    dry = args.device == "cpu"
    if not dry and not torch.cuda.is_available():
        print("error: no GPU is at hand, and nothing else can give its figures; `--device cpu` is a dry run")
        return 2
    if dry:
        args.rows, args.most, args.steps, args.rounds = 4, args.most and 4, 6, 1
    device = "a dry run on the CPU" if dry else torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or write_rows(Path(folder) / "rows.jsonl", 200 if dry else 8000)
        bench = Bench(data.resolve(), Path(folder), SMALL if dry else LARGE)
        if args.sanity:
            print(bench.sanity(args.rows), flush=True)
        speeds = compare(bench, args.rows, args.steps, args.rounds)
        result = {
            "command": "python benchmarks/gpu_training.py " + shlex.join(sys.argv[1:]),
            "date": time.strftime("%Y-%m-%d"),
            "device": device,
            "versions": versions(),
            "model": bench.model,
            "rows": args.rows,
            "nominal": next((rate for part, rate in RATES.items() if part in device), None),
            "product_rate": product_rate(args.device, 256 if dry else 8192),
            "speeds": {head: [asdict(speed) for speed in runs] for head, runs in speeds.items()},
            "largest": {},
        }
        save(result, dry)
        for head in HEADS if args.most else ():
            result["largest"][head] = bench.largest(head, args.rows, args.most)
            save(result, dry)
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
