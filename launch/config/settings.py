"""What flags and a recipe say together: flags over a recipe over defaults, and whether a run can be made of it.

Nothing here imports torch, so that a mistake can be told at once (`launch.config.early`).
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from launch.common.errors import UserError
from launch.config.limits import REFUSED, check_values
from launch.config.options import SftOptions, check_options
from launch.config.recipe import DEFAULT_RECIPE, check_recipe_values, read_recipe, recipe_argv

OWN = {f.name for f in fields(SftOptions)}


class Source:
    """The words of the command line or of a recipe, with the place of each name for an error."""

    def __init__(self, argv: Sequence[str], name: str, lines: dict[str, int] | None = None):
        self.argv, self.name, self.lines = list(argv), name, lines

    @property
    def is_command_line(self) -> bool:
        return self.lines is None

    def place(self, name: str) -> str:
        """Return where a name stands: the command line, or the recipe's line."""
        line = (self.lines or {}).get(name)
        return self.name if line is None else f"{self.name}:{line}"


Reader = Callable[[Source], dict[str, Any]]


def combine(argv: Sequence[str], read: Reader) -> tuple[SftOptions, dict[str, Any]]:
    """Return flags and recipe as `SftOptions` and the keyword arguments of `SftTrainingArguments`.

    `read` returns the values that a source gives, each of its type, and nothing of the others. Raises `UserError` for
    an unknown key, a value of the wrong type or out of its range, or a refused one.
    """
    flags = read(Source(argv, "command line"))
    path = _recipe_path(flags)
    values = {}
    if path:
        recipe, lines = read_recipe(path)
        values = read(Source(recipe_argv(recipe, path), str(path), lines))
        check_recipe_values(values, path)
    for given, other in (("model", "model_config"), ("model_config", "model")):
        if given in flags:
            values.pop(other, None)  # a flag for one source of the model overrides a recipe's other one
    values |= flags
    values["recipe"] = str(path) if path else None
    options = SftOptions(**{name: value for name, value in values.items() if name in OWN})
    check_options(options)
    training_values = {name: value for name, value in values.items() if name not in OWN}
    check_values(training_values)
    if training_values.get("eval_strategy") == "no":
        training_values.setdefault("eval_on_start", False)
    return options, training_values


def refuse(names: set[str], source: Source) -> None:
    """Raise `UserError` if one of these names is of an argument that no run takes."""
    for name in sorted(names & REFUSED.keys()):
        raise UserError(f"{source.place(name)}: {name}: {REFUSED[name]}")


def _recipe_path(flags: dict[str, Any]) -> Path | None:
    """The recipe to start from: the one named, or the embedded default unless a model is named."""
    if flags.get("recipe"):
        return Path(flags["recipe"])
    return None if flags.get("model") or flags.get("model_config") else DEFAULT_RECIPE
