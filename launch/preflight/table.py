"""The table of `--sanity`: one row per check, with its figure and the bound it must meet."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Check:
    """One row of the table; `passed` is None for a figure without a bound."""

    name: str
    figure: str
    bound: str = ""
    passed: bool | None = None


def show(checks: list[Check]) -> None:
    table = Table(title="sanity")
    for column in ("check", "", "figure", "bound"):
        table.add_column(column, overflow="fold")
    verdicts = {True: "[green]pass", False: "[bold red]FAIL", None: ""}
    for check in checks:
        table.add_row(check.name, verdicts[check.passed], check.figure, check.bound)
    Console(width=None if Console().is_terminal else 150).print(table)
