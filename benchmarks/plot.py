"""Time and memory of the heads against the vocabulary, from what `heads.py` wrote.

python benchmarks/plot.py benchmarks/results/vocabulary.json     writes vocabulary.png beside it
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(source: Path) -> None:
    result = json.loads(source.read_text())
    share = f"{result['settings']['ignored'][0]:g}"
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    names = result["settings"]["contenders"]
    for name in names:
        points = [p for p in result["points"] if f"{name}@{share}" in p["seconds"]]
        if not points:
            continue
        vocab = [p["vocab"] / 1000 for p in points]
        style = {"linestyle": "--", "color": "grey"} if name == "products" else {}
        style |= {"linewidth": 2.5} if name == "fused" else {}
        (line,) = left.plot(
            vocab, [p["seconds"][f"{name}@{share}"]["least"] for p in points], marker="o", label=name, **style
        )
        right.plot(
            vocab, [p["peak_bytes"][name] / 1e6 for p in points], marker="o", **{**style, "color": line.get_color()}
        )
    settings = result["settings"]
    figure.suptitle(
        f"Head and loss, forward and backward: {settings['ranks']} CPU ranks with one thread, fp32, "
        f"T={settings['tokens']}, H={settings['hidden']}"
    )
    left.set(xlabel="vocabulary, thousands", ylabel="seconds (least of the rounds)", ylim=(0, None))
    right.set(xlabel="vocabulary, thousands", ylabel="peak MB over the inputs, each rank", ylim=(0, None))
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(source.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
