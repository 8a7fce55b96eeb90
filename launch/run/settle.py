"""A run's directory as its next start needs it: the recipe of this start, and nothing past its checkpoint."""

import json
import shutil
from datetime import date
from pathlib import Path

import yaml

from launch.common.atomic_files import write_whole
from launch.common.paths import (
    CHECKPOINT_PARTIAL,
    METRICS,
    MODEL_PARTIAL,
    RECIPE,
    REMOVED,
    STARTED,
    TRACEBACKS,
    UNIVERSAL_PARTIAL,
)
from launch.run.checkpoints import step_of


def settle(path: Path, recipe: dict, checkpoint: Path | None, day: date) -> None:
    """Write the recipe and, once, the day; remove what a start left unfinished, and metrics past the checkpoint."""
    for partial in (CHECKPOINT_PARTIAL, UNIVERSAL_PARTIAL, MODEL_PARTIAL):
        shutil.rmtree(path / partial, ignore_errors=True)
    for leftover in path.glob(f"{REMOVED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in path.glob(TRACEBACKS):
        leftover.unlink()
    write_whole(path / RECIPE, yaml.safe_dump(recipe, sort_keys=True))
    if not (path / STARTED).exists():
        write_whole(path / STARTED, f"{day}\n")
    if (path / METRICS).exists():
        kept = [] if checkpoint is None else _metrics_until(path / METRICS, step_of(checkpoint))
        write_whole(path / METRICS, "".join(kept))


def _metrics_until(path: Path, step: int) -> list[str]:
    """Return complete lines of steps up to `step`; an interrupted run leaves half a line, and later steps' lines."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return kept
