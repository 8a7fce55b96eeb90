"""Time and memory of the heads against one size each, from what `heads.py` wrote.

python benchmarks/plot.py vocabulary tokens ranks      results/NAME.json; writes results/heads.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
LABELS = {"vocab": "vocabulary", "tokens": "tokens with a label", "ranks": "ranks, on two cores"}
STYLES = {"fused": {"linewidth": 2.5, "color": "black"}, "products": {"linestyle": "--", "color": "grey"}}


def main(names: list[str]) -> None:
    results = [json.loads((RESULTS / f"{name}.json").read_text()) for name in names]
    figure, axes = plt.subplots(2, len(results), figsize=(4.6 * len(results), 7), squeeze=False)
    for result, (above, below) in zip(results, axes.T, strict=True):
        draw(result, above, below)
    hidden = results[0]["settings"]["hidden"]
    figure.suptitle(f"Head and loss, forward and backward: CPU ranks with one thread, fp32, H={hidden}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(RESULTS / "heads.png", dpi=110)


def draw(result: dict, above, below) -> None:
    """Seconds above and peak memory below, against the one size that the points differ in."""
    points, settings = result["points"], result["settings"]
    axis = next(key for key in LABELS if len({point[key] for point in points}) > 1)
    share = f"{settings['ignored'][0]:g}"
    for name in settings["contenders"]:
        timed = [p for p in points if f"{name}@{share}" in p["seconds"]]
        sizes = [p[axis] for p in timed]
        style = {"marker": "o", "label": name} | STYLES.get(name, {})
        above.plot(sizes, [p["seconds"][f"{name}@{share}"]["median"] for p in timed], **style)
        below.plot(sizes, [p["peak_bytes"][name] / 1e6 for p in timed], **style)
    fixed = ", ".join(f"{key}={points[0][key]:,}" for key in ("tokens", "vocab", "ranks") if key != axis)
    above.set(title=fixed, ylabel="seconds, median", ylim=(0, None), xlim=(0, None))
    below.set(xlabel=LABELS[axis], ylabel="peak MB over the inputs, each rank", ylim=(0, None), xlim=(0, None))


if __name__ == "__main__":
    main(sys.argv[1:])
