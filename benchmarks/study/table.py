"""The study as a document: a table for each noise, differences from plain training, and classes of token."""

import shlex
import sys

from benchmarks.study.design import Design

SHOWN = {
    "nll": "nll",
    "accuracy": "accuracy",
    "confidence_minus_accuracy": "confidence - accuracy",
    "ece_equal_mass": "ECE",
    "brier": "Brier",
    "aurc": "AURC",
    "entropy": "entropy",
    "temperature": "T",
}
PAIRED = ("nll", "confidence_minus_accuracy", "ece_equal_mass", "brier", "aurc")


def document(figures: dict, design: Design, hardware: str) -> str:
    """Return the results in Markdown."""
    command = shlex.join(["python", "-m", "benchmarks.study", *sys.argv[1:]])
    parts = [
        "# Does smoothing help?",
        f"`{command}`, {hardware}.",
        f"{figures['base_model']}, {design.rows} rows for each of {design.seeds} seeds, {design.epochs[-1]} epochs "
        f"(measured after {', '.join(map(str, design.epochs))}), `{' '.join(design.flags)}`; {design.held_out} rows "
        "held out: temperatures and epochs are chosen by one half, everything is measured on the other. In brackets "
        "what 95 % of resamples of seeds and rows lie in. T: what the logits would be divided by for the least nll.",
    ]
    for noise in sorted({arm["noise"] for arm in figures["arms"]}):
        arms = [arm for arm in figures["arms"] if arm["noise"] == noise]
        parts += [_title(noise), _table(figures["base"], arms), _paired(arms)]
    return "\n\n".join([*parts, "## By class of token", _classes(figures)]) + "\n"


def _title(noise: float) -> str:
    return f"## {noise:.0%} of the rows with another row's answer" if noise else "## Rows as they are"


def _name(arm: dict) -> str:
    return f"{arm['treatment']}, {arm['remedy']}"


def _table(base: dict, arms: list[dict]) -> str:
    rows = [("the base", base)] + [(_name(arm), arm) for arm in arms]
    return _markdown(["", *SHOWN.values()], [[name, *(_cell(of, key) for key in SHOWN)] for name, of in rows])


def _paired(arms: list[dict]) -> str:
    rows = [[_name(arm), *(_cell(arm["minus_plain"], key, "+") for key in PAIRED)] for arm in arms[1:]]
    return _markdown([f"minus {_name(arms[0])}", *(SHOWN[key] for key in PAIRED)], rows)


def _classes(figures: dict) -> str:
    classes = list(figures["base"]["by_class"])
    rows = [("the base", figures["base"])]
    rows += [(f"{_name(arm)}, noise {arm['noise']:g}", arm) for arm in figures["arms"]]
    cells = []
    for name, of in rows:
        found = [of["by_class"].get(kind) for kind in classes]
        cells.append([name, *(f"{one['confidence_minus_accuracy']:+.3f}" if one else "" for one in found)])
    return "Confidence minus accuracy.\n\n" + _markdown(["", *classes], cells)


def _cell(figures: dict, key: str, sign: str = "") -> str:
    low, high = figures[f"{key}_interval"]
    return f"{figures[key]:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
