"""What the study runs: label smoothing x label noise x seeds, from one base, on rows of its own for each seed."""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ANSWERS = ("answer", "completion", "output", "response")


@dataclass(frozen=True)
class Treatment:
    """How runs are trained: smoothing, its prior, and the share of rows that have another row's answer."""

    smoothing: float
    prior: str = "uniform"
    noise: float = 0.0

    @property
    def name(self) -> str:
        prior = f" {self.prior}" if self.smoothing and self.prior != "uniform" else ""
        return f"ε={self.smoothing:g}{prior}"


@dataclass(frozen=True)
class Cell:
    """One run."""

    treatment: Treatment
    seed: int

    @property
    def folder(self) -> str:
        t = self.treatment
        return f"smoothing-{t.smoothing:g}-{t.prior}-noise-{t.noise:g}-seed-{self.seed}"


@dataclass(frozen=True)
class Design:
    """The study.

    Attributes:
        treatments: Each is run with every seed; of each noise the first is the plain one that others are held to.
        seeds: How many.
        rows: Rows that each seed trains on.
        held_out: Rows that all are measured on; a temperature is fitted on every second of them.
        epochs: After which a run is measured; the last is its length.
        flags: Of `launch/sft.py`, for all runs.
    """

    treatments: tuple[Treatment, ...]
    seeds: int
    rows: int
    held_out: int
    epochs: tuple[int, ...]
    flags: tuple[str, ...]

    def cells(self) -> list[Cell]:
        """Return every run, one seed after another, so that a study that is cut short has whole seeds."""
        return [Cell(treatment, seed) for seed in range(self.seeds) for treatment in self.treatments]


STUDY = Design(
    treatments=(
        Treatment(0.0),
        Treatment(0.05),
        Treatment(0.1),
        Treatment(0.1, "unigram"),
        Treatment(0.0, noise=0.4),
        Treatment(0.1, noise=0.4),
    ),
    seeds=3,
    rows=64,
    held_out=128,
    epochs=(1, 2, 3),
    flags=(
        "--learning_rate",
        "2e-4",
        "--per_device_train_batch_size",
        "8",
        "--bf16",
        "true",
        "--train_sampling_strategy",
        "group_by_length",
    ),
)
SMOKE = Design(
    treatments=(Treatment(0.0), Treatment(0.1), Treatment(0.1, "unigram"), Treatment(0.0, noise=0.4)),
    seeds=2,
    rows=200,
    held_out=40,
    epochs=(1, 3),
    flags=(
        "--learning_rate",
        "1e-3",
        "--per_device_train_batch_size",
        "8",
        "--max_length",
        "256",
        "--max_dropped",
        "0.5",
    ),
)


def rows_problem(train: Sequence[Mapping], held_out: Sequence[Mapping], design: Design) -> str | None:
    """Return why a study cannot be made of these rows, or None."""
    if len(train) < design.rows or len(held_out) < design.held_out:
        return (
            f"{len(train):,} rows in --data and {len(held_out):,} in --eval_data, where {design.rows:,} and "
            f"{design.held_out:,} were expected; give more, or smaller --rows and --held_out"
        )
    if not any(name in train[0] for name in ANSWERS):
        return f"the rows of --data have none of the columns {', '.join(ANSWERS)}, whose values are swapped"
    return None


def rows_of(records: Sequence[dict], cell: Cell, design: Design) -> list[dict]:
    """Return the rows that a run trains on: those of its seed, some with another row's answer."""
    draw = random.Random(cell.seed)
    rows = [dict(records[index]) for index in sorted(draw.sample(range(len(records)), design.rows))]
    swap_answers(rows, cell.treatment.noise, draw)
    return rows


def swap_answers(rows: list[dict], share: float, draw: random.Random) -> None:
    """Give a share of the rows the answer of another of them. (Random tokens would be smoothing themselves.)"""
    answer = next(name for name in ANSWERS if name in rows[0])
    chosen = draw.sample(range(len(rows)), round(share * len(rows)))
    answers = [rows[index][answer] for index in chosen]
    for index, other in zip(chosen, answers[1:] + answers[:1], strict=True):
        rows[index][answer] = other


def write_jsonl(file: Path, rows: Sequence[Mapping]) -> None:
    file.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows))
