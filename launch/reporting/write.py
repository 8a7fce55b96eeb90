"""A report written to its file; at the end of a run whatever goes wrong with it is said in a sentence."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.common.atomic_files import write_whole
from launch.common.errors import UserError
from launch.common.messages import typed_error_line
from launch.common.paths import REPORT
from launch.process.ranks import is_main, say
from launch.reporting.page import page
from launch.reporting.read import RunFiles, read_run


def write_report(paths: Sequence[Path], output: Path) -> None:
    """Write the report of these runs. Raises `UserError`."""
    runs = named([read_run(path) for path in paths])
    text = page(runs)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, text)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}; name another file with --output") from None


def report_at_the_end(run: Path) -> None:
    """Write `report.html` of a run that has just ended, on the first rank; the others do not wait for it."""
    if not is_main():
        return
    try:
        write_report([run], run / REPORT)
        say(f"report: {run / REPORT}")
    except Exception as error:  # the run has its model, and is not to fail now
        say(f"no report was written: {typed_error_line(error)}; python launch/report.py {run} tries again")


def named(runs: Sequence[RunFiles]) -> list[RunFiles]:
    """Return runs with names that differ: as many of the last parts of their paths as that takes."""
    for parts in range(1, max(len(run.path.resolve().parts) for run in runs) + 1):
        names = ["/".join(run.path.resolve().parts[-parts:]) for run in runs]
        if len(set(names)) == len(names):
            break
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
