"""The study's figures: each arm's mean over seeds, with intervals over seeds and rows, and against plain training.

Legend: S seeds, R held-out rows, B resamples.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.study.design import Cell, Design, Treatment
from benchmarks.study.measured import Measured
from launch.evaluation.figures import Tokens, resampled, resamples, with_intervals
from launch.evaluation.forward import KINDS
from launch.evaluation.report import TEMPERATURES

RESAMPLES = 400
AS_TRAINED, BEST_EPOCH, TEMPERATURE, UNSMOOTHED = "as trained", "best epoch", "temperature", "unsmoothed"
Drawn = dict[str, np.ndarray]  # each figure, [B]; the first is that of all rows and seeds


@dataclass(frozen=True)
class Arm:
    """What one may do with a run: take its model as it is, or after one of the remedies. Tokens of each seed."""

    treatment: Treatment
    remedy: str
    tokens: list[Tokens]


class Resampling:
    """The same draws for every arm, so that differences are paired: rows, and independently of them seeds."""

    def __init__(self, rows: int, seeds: int):
        self.counts_BR = resamples(rows, RESAMPLES)
        drawn = np.random.default_rng(1).integers(seeds, size=(RESAMPLES, seeds))
        self.seeds_BS = np.concatenate([np.arange(seeds)[None], drawn])

    def of(self, tokens: list[Tokens]) -> Drawn:
        """Return each figure's mean over the seeds of each resample."""
        seeds = [resampled(one, TEMPERATURES, self.counts_BR) for one in tokens]
        values = {name: np.stack([one[name] for one in seeds], 1) for name in seeds[0]}
        picked = self.seeds_BS % len(seeds)  # the base is measured once
        return {name: np.take_along_axis(value_BS, picked, 1).mean(1) for name, value_BS in values.items()}


def arms_of(treatment: Treatment, design: Design, folder: Path) -> list[Arm]:
    """Return every arm of one treatment, from what its runs measured. Unsmoothed only where it was smoothed."""
    runs = []
    for seed in range(design.seeds):
        cell = folder / Cell(treatment, seed).folder
        runs.append([Measured.read(cell / Measured.file(epoch)) for epoch in design.epochs])
    last = [epochs[-1] for epochs in runs]
    best = [min(epochs, key=lambda measured: measured.even.nll.mean()) for epochs in runs]
    arms = [
        Arm(treatment, AS_TRAINED, [run.as_trained for run in last]),
        Arm(treatment, BEST_EPOCH, [run.as_trained for run in best]),
        Arm(treatment, TEMPERATURE, [run.after_temperature for run in last]),
    ]
    if treatment.smoothing:
        arms.append(Arm(treatment, UNSMOOTHED, [run.unsmoothed for run in last]))
    return arms


def figures_of(design: Design, folder: Path) -> dict:
    """Return the base and all arms: each figure with its interval, and its difference from plain training."""
    base = Measured.read(folder / design.cells()[0].folder / Measured.file(0)).as_trained
    draws = Resampling(int(base.row.max()) + 1, design.seeds)
    arms, plain = [], {}
    for treatment in design.treatments:
        for arm in arms_of(treatment, design, folder):
            drawn = draws.of(arm.tokens)
            plain.setdefault(treatment.noise, drawn)
            against = {name: drawn[name] - plain[treatment.noise][name] for name in drawn}
            arms.append(
                {
                    "treatment": treatment.name,
                    "smoothing": treatment.smoothing,
                    "prior": treatment.prior,
                    "noise": treatment.noise,
                    "remedy": arm.remedy,
                    **with_intervals(drawn),
                    "minus_plain": with_intervals(against),
                    "by_class": by_class(arm.tokens),
                }
            )
    return {"base": {**with_intervals(draws.of([base])), "by_class": by_class([base])}, "arms": arms}


def by_class(tokens: list[Tokens]) -> dict[str, dict[str, float]]:
    """Return confidence, accuracy and their difference of each class of token, over all seeds."""
    found = {}
    for index, name in enumerate(KINDS):
        confidence = np.concatenate([one.confidence[one.kind == index] for one in tokens])
        correct = np.concatenate([one.correct[one.kind == index] for one in tokens])
        if len(confidence):
            found[name] = {
                "tokens": len(confidence) // len(tokens),
                "confidence": float(confidence.mean()),
                "accuracy": float(correct.mean()),
                "confidence_minus_accuracy": float(confidence.mean() - correct.mean()),
            }
    return found
