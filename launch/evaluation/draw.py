"""The reliability diagram, one panel a column of the table."""

from pathlib import Path

from launch.evaluation.report import columns

INK, SURE, UNSURE = "#222222", "#c8553d", "#3d6fa5"


def draw(evaluation: dict, folder: Path) -> Path:
    """Write `reliability.png`: accuracy over confidence in bins of as many tokens, and the gap between them."""
    from matplotlib.figure import Figure

    parts = columns(evaluation)
    figure = Figure(figsize=(3.4 * len(parts), 3.9), layout="constrained")
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axis, (title, figures) in zip(axes, parts.items(), strict=True):
        sure, right = figures["reliability"]["confidence"], figures["reliability"]["accuracy"]
        axis.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for x, y in zip(sure, right, strict=True):
            axis.plot([x, x], [x, y], color=SURE if x > y else UNSURE, linewidth=5, alpha=0.35, zorder=2)
        axis.plot(sure, right, color=INK, marker="o", markersize=4.5, linewidth=1.2, zorder=3)
        gap = figures["confidence_minus_accuracy"]
        axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
        axis.text(
            0.04,
            0.96,
            f"ECE {figures['ece_equal_mass']:.3f}\n{'over' if gap > 0 else 'under'}confident by {abs(gap):.3f}\n"
            f"nll {figures['nll']:.3f}",
            transform=axis.transAxes,
            va="top",
            fontsize=9,
            color=INK,
        )
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="confidence")
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
