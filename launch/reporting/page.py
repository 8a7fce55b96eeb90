"""The page of a report: one HTML file that needs nothing else, and in which nothing of the data can run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from launch.common.messages import counted
from launch.data.preview.page import environment
from launch.reporting import figures
from launch.reporting.about import shown_row
from launch.reporting.charts import Chart
from launch.reporting.read import RunFiles

TEMPLATES = Path(__file__).parent / "templates"
MOST_PLACES = 12  # of rows that were dropped for one reason
GROUPS: tuple[tuple[str, str, Callable[[Sequence[RunFiles]], list[Chart]]], ...] = (
    ("Training", "what each step has logged", figures.training),
    ("Held-out rows", "rows that are never trained on", figures.held_out),
    ("Reliability", "how often a prediction is right, by how sure the model is", figures.reliability),
    ("Speed and memory", "", figures.speed),
)


def page(runs: Sequence[RunFiles]) -> str:
    """Return the page of one run, or of several side by side."""
    groups, problem = charts(runs)
    template = environment(TEMPLATES).get_template("report.html")
    return template.render(
        title=runs[0].name if len(runs) == 1 else counted(len(runs), "run"),
        runs=runs,
        results=figures.results(runs),
        settings=figures.settings(runs),
        groups=groups,
        problem=problem,
        shown_row=shown_row,
        places_shown=MOST_PLACES,
        level=level,
        yaml=written,
    )


def charts(runs: Sequence[RunFiles]) -> tuple[list[tuple[str, str, list[Chart]]], str]:
    """Return the groups of charts that there are, and why there are none, if that is so."""
    try:
        groups = [(name, about, draw(runs)) for name, about, draw in GROUPS]
    except ImportError as error:
        return [], f"No charts: they need matplotlib (pip install matplotlib); {error}."
    groups = [group for group in groups if group[2]]
    return groups, "" if groups else "No charts: no step was logged."


def level(probability: float) -> int:
    """Return how strongly a token is marked, from 0, where the model was sure, to 5."""
    return min(5, int((1 - probability) * 6))


def written(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, allow_unicode=True, sort_keys=True) if values else ""
