"""Which charts and which numbers tell how runs went, each made only of what the runs have measured."""

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

from launch.evaluation.draw import Colours, panel, risk_lines, said
from launch.evaluation.report import columns
from launch.reporting.charts import ACCENT, INK, QUIET, SIZE, Chart, Line, drawn, line_chart
from launch.reporting.read import RunFiles

PANEL = (2.9, 3.05)
MOST_PANELS = 8


class Curve(NamedTuple):
    """A number that is drawn over the steps, if it was logged."""

    key: str
    title: str
    about: str
    zero: bool = False


TRAINING = (
    Curve("loss", "Loss", "what is optimised, on the rows of each step"),
    Curve("nll", "Unsmoothed nll", "the same tokens without smoothing"),
    Curve("accuracy", "Accuracy", "share of the learned tokens that are predicted right"),
    Curve("grad_norm", "Norm of the gradient", "before it is clipped", zero=True),
    Curve("lr", "Learning rate", "as scheduled", zero=True),
)
HELD_OUT = (
    Curve("eval_nll", "Held-out nll", "never smoothed"),
    Curve("eval_accuracy", "Held-out accuracy", "share of tokens that are predicted right"),
    Curve("eval_confidence_minus_accuracy", "Confidence minus accuracy", "above 0: overconfident"),
    Curve("eval_ece_equal_mass", "ECE", "mean gap between confidence and accuracy, 15 bins of equal mass", zero=True),
    Curve("eval_unsmoothed_ece_equal_mass", "ECE, unsmoothed", "with the smoothing taken out", zero=True),
    Curve("eval_brier", "Brier score", "squared distance from the label"),
    Curve("eval_aurc", "AURC", "mean error of the surest tokens; lower is better"),
)
SPEED = (
    Curve("tokens_per_second", "Throughput", "tokens a second, prompts too", zero=True),
    Curve("peak_memory_gib", "Peak memory", "GiB of the first rank", zero=True),
)


def training(runs: Sequence[RunFiles]) -> list[Chart]:
    """Return the charts of the steps; of one run its loss and its nll in one."""
    if len(runs) > 1:
        return _curves(runs, TRAINING)
    both = [Line(name, *runs[0].series(key)) for key, name in (("loss", "loss"), ("nll", "nll, unsmoothed"))]
    both = [line for line in both if line.x]
    about = "what is optimised, and the same tokens without smoothing"
    first = [line_chart("Loss and nll", about, both)] if both else []
    return first + _curves(runs, TRAINING[2:])


def held_out(runs: Sequence[RunFiles]) -> list[Chart]:
    """Return the charts of the evaluations."""
    return _curves(runs, HELD_OUT)


def speed(runs: Sequence[RunFiles]) -> list[Chart]:
    """Return the charts of throughput, memory, and whatever is logged of the use of the hardware."""
    used = dict.fromkeys(key for run in runs for row in run.metrics for key in row if "mfu" in key.lower())
    more = [Curve(key, "MFU", "share of the hardware's peak that the model's operations take", True) for key in used]
    return _curves(runs, [*SPEED, *more])


def reliability(runs: Sequence[RunFiles]) -> list[Chart]:
    """Return reliability diagrams: before and after training, and those of `launch/evaluate.py`."""
    colours = Colours(INK, ACCENT, QUIET, QUIET)
    charts: list[Chart] = []
    for run in runs:
        for title, about, figures in _measured(run):
            name = title if len(runs) == 1 else f"{run.name}: {title}"

            def draw(axis: Any, figures: dict = figures) -> None:
                panel(axis, figures, colours)
                axis.set_ylabel("accuracy")

            about = f"{', '.join(said(figures))}; {about}"
            charts.append(Chart(name, about, drawn(draw, f"reliability {name}", PANEL)))
    return charts[:MOST_PANELS] + [chart for run in runs for chart in _risk(run, len(runs) > 1)]


def _risk(run: RunFiles, named: bool) -> list[Chart]:
    """The chart of risk over coverage, if `launch/evaluate.py` has measured it."""
    parts = columns(run.evaluation) if run.evaluation else {}
    parts = {title: figures for title, figures in parts.items() if figures.get("risk_coverage")}
    if not parts:
        return []

    def draw(axis: Any) -> None:
        risk_lines(axis, parts, (INK, ACCENT, QUIET, ACCENT))

    title = f"{run.name}: risk and coverage" if named else "Risk and coverage"
    return [Chart(title, "what is wrong among the surest predictions", drawn(draw, title, SIZE))]


def _measured(run: RunFiles) -> Iterator[tuple[str, str, dict]]:
    """The calibrations that a run has: title, what they are of, and the figures."""
    rows = [row for row in run.metrics if isinstance(row.get("eval_reliability"), dict)]
    for title, row in [("before training", rows[0]), ("after training", rows[-1])] if len(rows) > 1 else []:
        figures = {key.removeprefix("eval_"): value for key, value in row.items()}
        yield title, f"held-out rows at step {row['step']:,}", figures
    if run.evaluation:
        parts = columns(run.evaluation)
        if not run.evaluation["label_smoothing"]:
            del parts["unsmoothed"]
        before = {"base": "before training"}
        after = {"as it is": "after training"} if "base" in parts else {}
        for title, figures in sorted(parts.items(), key=lambda part: part[0] != "base"):
            yield (before | after).get(title, title), f"on {_text(run.evaluation['data'])}", figures


def _curves(runs: Sequence[RunFiles], curves: Sequence[Curve]) -> list[Chart]:
    charts = []
    for curve in curves:
        lines = [Line(run.name, *run.series(curve.key)) for run in runs]
        if any(line.x for line in lines):
            charts.append(line_chart(curve.title, curve.about, lines, zero=curve.zero))
    return charts


class Number(NamedTuple):
    """A row of the table of results: what of a logged number, and how it is written."""

    name: str
    key: str
    of: Callable[[list[float]], float]
    form: str


def _last(values: list[float]) -> float:
    return values[-1]


def _first(values: list[float]) -> float:
    return values[0]


NUMBERS = (
    Number("loss, last", "loss", _last, ".4f"),
    Number("nll, last", "nll", _last, ".4f"),
    Number("held-out nll, first", "eval_nll", _first, ".4f"),
    Number("held-out nll, best", "eval_nll", min, ".4f"),
    Number("held-out nll, last", "eval_nll", _last, ".4f"),
    Number("held-out accuracy, last", "eval_accuracy", _last, ".1%"),
    Number("held-out confidence, last", "eval_confidence", _last, ".1%"),
    Number("confidence minus accuracy", "eval_confidence_minus_accuracy", _last, "+.3f"),
    Number("ECE, equal mass", "eval_ece_equal_mass", _last, ".4f"),
    Number("ECE, unsmoothed", "eval_unsmoothed_ece_equal_mass", _last, ".4f"),
    Number("Brier score", "eval_brier", _last, ".4f"),
    Number("AURC", "eval_aurc", _last, ".4f"),
    Number("tokens a second, median", "tokens_per_second", median, ",.0f"),
    Number("peak memory, GiB", "peak_memory_gib", max, ".2f"),
)


def results(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Return the rows of the table of results, each with a cell a run; what no run has is left out."""
    used = dict.fromkeys(key for run in runs for row in run.metrics for key in row if "mfu" in key.lower())
    table = [("steps", [f"{run.metrics[-1]['step']:,}" if run.metrics else "–" for run in runs])]
    for number in (*NUMBERS, *(Number("MFU, median", key, median, ".1%") for key in used)):
        values = [run.series(number.key)[1] for run in runs]
        if any(values):
            table.append((number.name, [format(number.of(found), number.form) if found else "–" for found in values]))
    return table


def settings(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Return the settings in which runs differ; of one run the ones that say most."""
    names = dict.fromkeys(name for run in runs for name in run.recipe)
    rows = [(name, ["–" if name not in run.recipe else _text(run.recipe[name]) for run in runs]) for name in names]
    if len(runs) > 1:
        return [(name, cells) for name, cells in rows if len(set(cells)) > 1]
    told = ("model", "data", "smoothing", "learning_rate", "max_steps", "num_train_epochs", "lora_rank", "tp")
    return [(name, cells) for name, cells in rows if name in told]


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
