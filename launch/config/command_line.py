"""The command line: flags over a recipe over defaults, every key known, every value of its type."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from launch.common.errors import UserError
from launch.config import early
from launch.config.early import HELP_FLAGS, follows_no_flag
from launch.config.hints import unknown_key
from launch.config.options import GROUPS, SftOptions
from launch.config.settings import OWN, Source, combine, refuse
from launch.config.training_arguments import HELP, HIDDEN, SftTrainingArguments

HELP_ALL = "--help-all"
METAVARS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "TEXT", dict: "JSON"}


def parse_options(argv: Sequence[str]) -> tuple[SftOptions, dict[str, Any]]:
    """Flags and recipe as `SftOptions` and the keyword arguments of `SftTrainingArguments`.

    The latter stay a dict until the DeepSpeed configuration is known: `TrainingArguments` starts the process group.
    Raises `UserError` for an unknown key, a value of the wrong type or out of its range, or a refused one.
    """
    return combine(argv, _parse)


def _parse(source: Source) -> dict[str, Any]:
    """The values that `source` gives, each of its type; nothing of the others."""
    if not HELP_FLAGS & set(source.argv):
        early.read(source)
    parser = _Parser(source, everything=HELP_ALL in source.argv)
    given, unknown = parser.parse_known_args(source.argv)
    known = {action.dest for action in parser._actions}
    if unknown:
        raise UserError(_unknown(unknown[0], known, source))
    names = {word.split("=")[0].lstrip("-").replace("-", "_") for word in source.argv if word.startswith("--")}
    refuse(names, source)
    names = {name.removeprefix("no_") if name not in known else name for name in names}
    return {name: value for name, value in vars(given).items() if name in names and name != "local_rank"}


def _unknown(word: str, known: set[str], source: Source) -> str:
    if not word.startswith("-"):
        return follows_no_flag(word)
    name = word.split("=")[0].lstrip("-")
    return f"{source.place(name)}: {unknown_key(name, known)}"


class _Parser(HfArgumentParser):
    """Reports errors as `UserError`, accepts no abbreviations, and shows this project's flags first."""

    def __init__(self, source: Source, everything: bool):
        super().__init__(
            (*GROUPS, SftTrainingArguments),
            prog="sft.py",
            usage="deepspeed launch/sft.py [--recipe FILE] [--flag value ...]",
            description="Fine-tune a causal LM with a label-smoothed loss whose vocabulary is sharded over ranks.",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            add_help=source.is_command_line,
        )
        self.source = source
        if source.is_command_line:
            self.add_argument(HELP_ALL, action="help", help="List the rest of transformers.TrainingArguments too.")
        transformers_help = {f.name: f.metadata.get("help") for f in fields(TrainingArguments)}
        for action in self._actions:
            action.metavar = action.metavar or _metavar(action)
            action.help = HELP.get(action.dest) or action.help or transformers_help.get(action.dest)
            shown = everything or action.dest in {*OWN, *HELP, "help", "help_all"}
            if action.dest in HIDDEN or not shown:
                action.help = argparse.SUPPRESS

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.source.name}: {message}")


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
