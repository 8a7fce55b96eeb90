"""The figures of an evaluation: reliability, risk over coverage, and classes of tokens."""

from collections.abc import Sequence
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
STYLES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)))


def draw(evaluation: dict, folder: Path) -> list[Path]:
    """Write the figures. Raises ImportError without matplotlib."""
    parts = columns(evaluation)
    answered = {title: figures["answers"] for title, figures in parts.items() if figures.get("answers")}
    paths = [_reliability(parts, folder / "reliability.png"), _risk_coverage(parts, folder / "risk-coverage.png")]
    if any(figures.get("by_class") for figures in parts.values()):
        paths += [_by_class(parts, folder / "by-class.png")]
    if answered:
        paths += [
            _reliability(answered, folder / "answers-reliability.png"),
            _risk_coverage(answered, folder / "answers-risk-coverage.png"),
        ]
    return paths


def _reliability(parts: dict[str, dict], path: Path) -> Path:
    """Draw accuracy over confidence in bins of as many tokens, and the gap between them, a panel a column."""
    figure, axes = _panels(len(parts), 3.9)
    for axis, (title, figures) in zip(axes, parts.items(), strict=True):
        panel(axis, figures)
        axis.text(0.04, 0.96, "\n".join(said(figures)), transform=axis.transAxes, va="top", fontsize=9)
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes[0].set_ylabel("accuracy")
    return _saved(
        figure, path, "How often a prediction is right, by how sure the model is (bars: how far from the diagonal)"
    )


def _risk_coverage(parts: dict[str, dict], path: Path) -> Path:
    """Draw the error of the surest predictions over the share of all that they are, a line a column."""
    figure, (axis,) = _panels(1, 3.6, width=5.2)
    risk_lines(axis, parts, [ON_PAPER.ink, ON_PAPER.over, ON_PAPER.under, ON_PAPER.quiet])
    return _saved(figure, path, "What is wrong among the surest predictions: low on the left if confidence tells")


def risk_lines(axis: Any, parts: dict[str, dict], colours: Sequence[str]) -> None:
    """Draw a line of risk over coverage for each part."""
    for (title, figures), colour, style in zip(parts.items(), colours, STYLES, strict=False):
        curve = figures["risk_coverage"]
        label = f"{title}, AURC {figures['aurc']:.3f}"
        axis.plot(curve["coverage"], curve["error"], color=colour, linestyle=style, label=label)
    axis.set(xlim=(0, 1), xlabel="share of predictions kept", ylabel="of them wrong")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8.5)


def _by_class(parts: dict[str, dict], path: Path) -> Path:
    """Draw confidence and accuracy of each class of token, a panel a column that has classes."""
    parts = {title: figures for title, figures in parts.items() if figures.get("by_class")}
    figure, axes = _panels(len(parts), 2.9)
    for axis, (title, figures) in zip(axes, parts.items(), strict=True):
        names = list(figures["by_class"])
        sure, right = ([figures["by_class"][name][key] for name in names] for key in ("confidence", "accuracy"))
        at = range(len(names))
        axis.hlines(at, sure, right, color=ON_PAPER.quiet, linewidth=1.2, zorder=1)
        axis.plot(right, at, "o", color=ON_PAPER.ink, markersize=6, label="accuracy")
        axis.plot(sure, at, "D", color=ON_PAPER.over, markerfacecolor="white", markersize=6, label="confidence")
        axis.set_yticks(at, names)
        axis.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes[0].legend(frameon=False, fontsize=8.5)
    return _saved(figure, path, "How sure the model is, and how often right, by class of token")


def _panels(count: int, height: float, width: float = 3.4) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#e8e8e8", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def _saved(figure: Any, path: Path, title: str) -> Path:
    figure.suptitle(title, fontsize=9, color="#555555", x=0.01, ha="left")
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
