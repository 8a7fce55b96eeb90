"""The study as a picture: what smoothing does to nll, confidence, calibration and selective prediction."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.study.figures import AS_TRAINED, BEST_EPOCH, TEMPERATURE, UNSMOOTHED

PANELS = {
    "confidence_minus_accuracy": "confidence - accuracy\n(0: calibrated)",
    "ece_equal_mass": "calibration error (ECE)\nlower is better",
    "nll": "nll, held out\nlower is better",
    "aurc": "AURC: confidence tells\nright from wrong, lower is better",
}
MARKS = {
    AS_TRAINED: ("o", "black"),
    UNSMOOTHED: ("s", "#1f6f8b"),
    TEMPERATURE: ("^", "#b4552d"),
    BEST_EPOCH: ("D", "grey"),
}


def draw(figures: dict, file: Path) -> None:
    """Draw a row of panels for each noise, arms side by side at each smoothing, with their intervals."""
    noises = sorted({arm["noise"] for arm in figures["arms"]})
    figure, grid = plt.subplots(
        len(noises), len(PANELS), figsize=(15, 3.6 * len(noises)), squeeze=False, sharey="col"
    )
    for noise, axes in zip(noises, grid, strict=True):
        arms = [arm for arm in figures["arms"] if arm["noise"] == noise]
        for (key, title), axis in zip(PANELS.items(), axes, strict=True):
            _panel(axis, key, arms, figures["base"])
            axis.set_title(title, fontsize=10)
        axes[0].set_ylabel(f"{noise:.0%} of answers swapped" if noise else "rows as they are")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(file, dpi=110)


def _panel(axis, key: str, arms: list[dict], base: dict) -> None:
    treatments = list(dict.fromkeys(arm["treatment"] for arm in arms))
    for place, (remedy, (marker, colour)) in enumerate(MARKS.items()):
        found = [arm for arm in arms if arm["remedy"] == remedy]
        at = [treatments.index(arm["treatment"]) + 0.16 * (place - 1.5) for arm in found]
        middle = [arm[key] for arm in found]
        ends = [
            [m - arm[f"{key}_interval"][0], arm[f"{key}_interval"][1] - m]
            for m, arm in zip(middle, found, strict=True)
        ]
        errors = list(zip(*[[max(0.0, end) for end in pair] for pair in ends], strict=True))
        axis.errorbar(at, middle, errors, fmt=marker, color=colour, markersize=6, capsize=2, label=remedy)
    axis.axhline(base[key], color="black", linestyle=":", linewidth=1, label="the base")
    if key == "confidence_minus_accuracy":
        axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_xticks(range(len(treatments)), [name.replace(" ", "\n") for name in treatments], fontsize=9)
    axis.set_xlim(-0.5, len(treatments) - 0.5)
    axis.spines[["top", "right"]].set_visible(False)
