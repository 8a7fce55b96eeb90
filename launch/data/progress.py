"""What is shown while rows are prepared: a bar on a terminal, a line now and then elsewhere."""

import time

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from launch.process.ranks import is_main, say

SECONDS = 30.0


class RowsProgress:
    """Shows how many rows are prepared, and how many were dropped.

    Args:
        doing: What it is that takes its time.
    """

    def __init__(self, doing: str):
        self.doing = doing
        console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        self._bar = Progress(
            *columns, console=console, transient=True, disable=not (is_main() and console.is_terminal)
        )
        self._task = self._bar.add_task(doing, total=None)

    def __enter__(self) -> "RowsProgress":
        self._start = self._said = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def show(self, rows: int, dropped: int) -> None:
        """Show the numbers so far."""
        now = time.monotonic()
        text = f"{self.doing}: {rows:,} ({rows / (now - self._start):,.0f} rows/s), {dropped:,} dropped"
        if not self._bar.disable:
            self._bar.update(self._task, description=text)
        elif now - self._said >= SECONDS:
            self._said = now
            say(text)
