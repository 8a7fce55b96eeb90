"""The reliability diagram, one panel a column of the table."""

from pathlib import Path
from typing import Any, NamedTuple

from launch.evaluation.report import columns


class Colours(NamedTuple):
    """Of a diagram."""

    ink: str = "#222222"
    over: str = "#c8553d"
    under: str = "#3d6fa5"
    quiet: str = "#999999"


ON_PAPER = Colours()


def draw(evaluation: dict, folder: Path) -> Path:
    """Write `reliability.png`: accuracy over confidence in bins of as many tokens, and the gap between them."""
    from matplotlib.figure import Figure

    parts = columns(evaluation)
    figure = Figure(figsize=(3.4 * len(parts), 3.9), layout="constrained")
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axis, (title, figures) in zip(axes, parts.items(), strict=True):
        panel(axis, figures)
        axis.text(0.04, 0.96, "\n".join(said(figures)), transform=axis.transAxes, va="top", fontsize=9)
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e8e8e8", linewidth=0.6)
        axis.set_axisbelow(True)
    axes[0].set_ylabel("accuracy")
    figure.suptitle(
        "How often a prediction is right, by how sure the model is (bars: how far from the diagonal)",
        fontsize=9,
        color="#555555",
        x=0.01,
        ha="left",
    )
    path = folder / "reliability.png"
    figure.savefig(path, dpi=160)
    return path


def panel(axis: Any, figures: dict, colours: Colours = ON_PAPER) -> None:
    """Draw a reliability diagram of these figures."""
    sure, right = figures["reliability"]["confidence"], figures["reliability"]["accuracy"]
    axis.plot([0, 1], [0, 1], color=colours.quiet, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for x, y in zip(sure, right, strict=True):
        axis.plot([x, x], [x, y], color=colours.over if x > y else colours.under, linewidth=5, alpha=0.35, zorder=2)
    axis.plot(sure, right, color=colours.ink, marker="o", markersize=4.5, linewidth=1.2, zorder=3)
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="confidence")


def said(figures: dict) -> list[str]:
    """Return what stands beside a diagram."""
    gap = figures["confidence_minus_accuracy"]
    return [
        f"ECE {figures['ece_equal_mass']:.3f}",
        f"{'over' if gap > 0 else 'under'}confident by {abs(gap):.3f}",
        f"nll {figures['nll']:.3f}",
    ]
