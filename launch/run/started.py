"""The day on which a run was first started: what a chat template that prints the date is told at every resume."""

from datetime import date
from pathlib import Path

from launch.common.paths import STARTED


def first_day(wanted: str | None) -> date:
    """Return the day on which the run in a directory was first started; today for a new run."""
    try:
        return date.fromisoformat((Path(wanted or "") / STARTED).expanduser().read_text().strip())
    except (OSError, ValueError, RuntimeError):
        return date.today()
