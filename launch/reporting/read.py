"""The files of a run as a report needs them; what is not there is empty."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from launch.common.errors import UserError
from launch.common.paths import (
    ABOUT,
    DEEPSPEED,
    DROPPED,
    EVALUATION,
    EVALUATION_FOLDER,
    METRICS,
    MODEL,
    RECIPE,
    SAMPLES,
)

ENTRY = re.compile(r"(?P<where>.+?:\d+|[^:]+): (?P<reason>.*?)(?P<detail> \(.*\))?")


@dataclass(frozen=True)
class RunFiles:
    """A run.

    Attributes:
        path: Its directory.
        name: What it is called in a report of several.
        recipe: Its configuration.
        deepspeed: DeepSpeed's.
        metrics: Lines of `metrics.jsonl`.
        samples: Lines of `samples.jsonl`.
        dropped: Lines of `dropped.txt`.
        about: Its environment and a few rows.
        evaluation: What `launch/evaluate.py` has written into its model's folder.
    """

    path: Path
    name: str
    recipe: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps at which a number was logged, and its values."""
        rows = [row for row in self.metrics if isinstance(row.get(key), int | float)]
        return [row["step"] for row in rows], [float(row[key]) for row in rows]

    def reasons(self) -> list[tuple[str, list[str]]]:
        """Return each reason for which rows were dropped or shortened with its rows, the most frequent first."""
        rows: dict[str, list[str]] = {}
        for line in self.dropped:
            found = ENTRY.fullmatch(line)
            where, reason = (found["where"], found["reason"]) if found else (line, "other")
            rows.setdefault(reason, []).append(where + (found["detail"] or "" if found else ""))
        counts = Counter({reason: len(places) for reason, places in rows.items()})
        return [(reason, rows[reason]) for reason, _ in counts.most_common()]


def read_run(path: Path) -> RunFiles:
    """Read a run's directory. Raises `UserError` if it is none, or if a file cannot be read."""
    if not (path / RECIPE).is_file():
        raise UserError(f"{path} is not the directory of a run: it has no {RECIPE}")
    try:
        recipe = yaml.safe_load((path / RECIPE).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path / RECIPE} cannot be read: {error}") from None
    return RunFiles(
        path=path,
        name=path.resolve().name,
        recipe=recipe,
        deepspeed=_object(path / DEEPSPEED),
        metrics=[row for row in _lines(path / METRICS) if isinstance(row.get("step"), int)],
        samples=_lines(path / SAMPLES),
        dropped=_text(path / DROPPED).split("\n")[:-1],
        about=_object(path / ABOUT),
        evaluation=_object(path / MODEL / EVALUATION_FOLDER / EVALUATION),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _object(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        value = json.loads(text) if text else {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines; what is none, such as a line that is being written, is left out."""
    found = []
    for line in _text(path).split("\n"):
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
