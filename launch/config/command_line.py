"""The command line: flags over a recipe over defaults, every key known, every value of its type."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from launch.common.errors import UserError
from launch.common.messages import did_you_mean
from launch.config.limits import REFUSED, check_values
from launch.config.options import GROUPS, SftOptions, check_options
from launch.config.recipe import DEFAULT_RECIPE, check_recipe_values, recipe_argv
from launch.config.training_arguments import HELP, HIDDEN, SftTrainingArguments

HELP_ALL = "--help-all"
OWN = {f.name for f in fields(SftOptions)}
METAVARS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT", dict: "JSON"}


def parse_options(argv: Sequence[str]) -> tuple[SftOptions, dict[str, Any]]:
    """Flags and recipe as `SftOptions` and the keyword arguments of `SftTrainingArguments`.

    The latter stay a dict until the DeepSpeed configuration is known: `TrainingArguments` starts the process group.
    Raises `UserError` for an unknown key, a value of the wrong type, or a refused one.
    """
    flags = _parse(argv, "command line", add_help=True)
    recipe = _recipe_path(flags)
    values = {}
    if recipe:
        values = _parse(recipe_argv(recipe), str(recipe), add_help=False)
        check_recipe_values(values, recipe)
    for given, other in (("model", "model_config"), ("model_config", "model")):
        if given in flags:
            values.pop(other, None)  # a flag for one source of the model overrides a recipe's other one
    values |= flags
    values["recipe"] = str(recipe) if recipe else None
    options = SftOptions(**{name: value for name, value in values.items() if name in OWN})
    check_options(options)
    training_values = {name: value for name, value in values.items() if name not in OWN}
    check_values(training_values)
    return options, training_values


def _recipe_path(flags: dict[str, Any]) -> Path | None:
    """The recipe to start from: the one named, or the embedded default unless a model is named."""
    if flags.get("recipe"):
        return Path(flags["recipe"])
    return None if flags.get("model") or flags.get("model_config") else DEFAULT_RECIPE


def _parse(argv: Sequence[str], source: str, add_help: bool) -> dict[str, Any]:
    """The values that `argv` gives, each of its type; nothing of the others."""
    parser = _Parser(source, add_help, everything=HELP_ALL in argv)
    given, unknown = parser.parse_known_args(list(argv))
    known = {action.dest for action in parser._actions}
    if unknown:
        raise UserError(_unknown(unknown[0], known, source))
    names = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    for name in names & REFUSED.keys():
        raise UserError(f"{source}: {name}: {REFUSED[name]}")
    names = {name.removeprefix("no_") if name not in known else name for name in names}
    return {name: value for name, value in vars(given).items() if name in names and name != "local_rank"}


def _unknown(word: str, known: set[str], source: str) -> str:
    if not word.startswith("-"):
        return f"{source}: {word!r} follows no flag; every value belongs to one, as in --data train.jsonl"
    name = word.split("=")[0].lstrip("-")
    return f"{source}: unknown key {name!r}{did_you_mean(name, known) or '; see --help'}"


class _Parser(HfArgumentParser):
    """Reports errors as `UserError`, accepts no abbreviations, and shows this project's flags first."""

    def __init__(self, source: str, add_help: bool, everything: bool):
        super().__init__(
            (*GROUPS, SftTrainingArguments),
            prog="sft.py",
            usage="deepspeed launch/sft.py [--recipe FILE] [--flag value ...]",
            description="Fine-tune a causal LM with a label-smoothed loss whose vocabulary is sharded over ranks.",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            add_help=add_help,
        )
        self.source = source
        if add_help:
            self.add_argument(HELP_ALL, action="help", help="List the rest of transformers.TrainingArguments too.")
        transformers_help = {f.name: f.metadata.get("help") for f in fields(TrainingArguments)}
        for action in self._actions:
            action.metavar = action.metavar or _metavar(action)
            action.help = HELP.get(action.dest) or action.help or transformers_help.get(action.dest)
            shown = everything or action.dest in {*OWN, *HELP, "help", "help_all"}
            if action.dest in HIDDEN or not shown:
                action.help = argparse.SUPPRESS

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.source}: {message}")


def _metavar(action: argparse.Action) -> str | None:
    if action.choices or action.nargs == 0:
        return None
    return "true|false" if action.const is True else METAVARS.get(action.type, "VALUE")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling a flag (`--max-length` is accepted for `--max_length`), and no default that says nothing."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = ", ".join(action.option_strings[:2] if action.dest == "help" else action.option_strings[:1])
        values = "" if action.nargs == 0 else self._format_args(action, action.dest.upper())
        return f"{name} {values}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or "default:" in (action.help or "")
        return action.help if silent or action.nargs == 0 else super()._get_help_string(action)
