"""Tells a mistake in the flags before torch is imported, which takes seconds, and more where ranks share cores.

Names, types and choices of flags are read from the source of their classes. What is doubtful is left to
`launch.config.command_line`, which knows them from the classes themselves.
"""

import ast
import functools
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from launch.common.errors import UserError
from launch.common.messages import printable
from launch.config.deepspeed import check_early
from launch.config.hints import unknown_key
from launch.config.settings import Source, combine, refuse

# where the flags are and which classes hold them, in the order in which later ones override earlier ones
CLASSES = (
    ("transformers/training_args.py", "TrainingArguments"),
    ("launch/config/training_arguments.py", "SftTrainingArguments"),
    ("launch/config/options.py", "[A-Z][A-Za-z]*Flags"),
)
# where the values are that some flags have by name
NAMED_VALUES = ("transformers/trainer_utils.py", "transformers/training_args.py")
HELP_FLAGS = {"-h", "--help", "--help-all"}
TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
NUMBERS = {"int": (int, "a whole number"), "float": (float, "a number")}
OTHERS_SECONDS = 3.0  # in which the launcher ends this rank if the first one has told the same


class Flag(NamedTuple):
    """A flag's annotation, its choices if they are written out, and the values that transformers has names for."""

    annotation: str
    choices: tuple = ()
    values: tuple = ()

    @property
    def kinds(self) -> set[str]:
        return {part.strip() for part in self.annotation.split("|")} - {"None"}

    @property
    def takes_several(self) -> bool:
        return "list" in self.annotation


def end_on_mistake(argv: Sequence[str], take_place: Callable[[], None]) -> None:
    """Exit with code 2 and a sentence if the flags have a mistake that can be told by now.

    The first rank tells it; another one only if it still lives, since the first did not have the same error.

    Args:
        argv: The flags.
        take_place: Sets RANK, or raises `UserError`.
    """
    if HELP_FLAGS & set(argv):
        return
    try:
        take_place()
        options, training_values = combine(argv, read)
        if not options.sanity and not options.preview:
            check_early(options, training_values.get("deepspeed"), int(os.environ.get("WORLD_SIZE", "1")))
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(OTHERS_SECONDS)
        print(f"error: {'' if rank == '0' else f'rank {rank}: '}{printable(str(error))}", file=sys.stderr, flush=True)
        sys.exit(2)


def read(source: Source) -> dict[str, Any]:
    """Return the values that a source gives, of types that can be told from the source of the flags' classes."""
    known = flags()
    values: dict[str, Any] = {}
    for word, given in _grouped(source.argv):
        written, _, attached = word.partition("=")
        name = written.removeprefix("--").replace("-", "_")
        if name == "local_rank":
            continue
        if name not in known and name.removeprefix("no_") in known:
            continue
        if name not in known:
            plain = written.removeprefix("--")
            raise UserError(f"{source.place(plain)}: {unknown_key(plain, known)}")
        refuse({name}, source)
        if "=" in word:
            given = [attached, *given]
        value = _value(name, known[name], given, source.place(name))
        if value is not None:
            values[name] = value
    return values


def _grouped(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag with the words that follow it."""
    flag: str | None = None
    given: list[str] = []
    for word in argv:
        if word.startswith("--"):
            if flag is not None:
                yield flag, given
            flag, given = word, []
        elif flag is None:
            raise UserError(follows_no_flag(word))
        else:
            given.append(word)
    if flag is not None:
        yield flag, given


def follows_no_flag(word: str) -> str:
    return f"command line: {word!r} follows no flag; every value belongs to one, as in --data train.jsonl"


def _value(name: str, flag: Flag, given: list[str], place: str) -> Any:
    """Return a flag's value; None where that is left to others."""
    if flag.takes_several:
        return given or None
    if not given:
        if "bool" in flag.kinds:
            return True
        raise UserError(f"{place}: --{name} needs a value")
    if len(given) > 1:
        raise UserError(follows_no_flag(given[1]))
    (text,) = given
    choices = [str(choice) for choice in flag.choices or flag.values]
    if choices and text not in choices:
        unquoted = '; YAML reads no as false, so write "no"' if text == "false" and "no" in choices else ""
        raise UserError(f"{place}: --{name} must be one of {', '.join(choices)}, got {text!r}{unquoted}")
    if flag.kinds == {"bool"}:
        if text.lower() not in TRUE + FALSE:
            raise UserError(f"{place}: --{name} must be true or false, got {text!r}")
        return text.lower() in TRUE
    if len(flag.kinds) == 1 and (kind := next(iter(flag.kinds))) in NUMBERS:
        convert, words = NUMBERS[kind]
        with suppress(ValueError):
            return convert(text)
        raise UserError(f"{place}: --{name} must be {words}, got {text!r}")
    return text


@functools.cache
def flags() -> dict[str, Flag]:
    """Return all flags by name."""
    found: dict[str, Flag] = {}
    named = _named_values()
    for file, name in CLASSES:
        classes = [
            node for node in _parsed(file).body if isinstance(node, ast.ClassDef) and re.fullmatch(name, node.name)
        ]
        for node in (line for holder in classes for line in holder.body):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            flag, annotation = node.target.id, ast.unparse(node.annotation)
            if not flag.startswith("_"):
                values = found[flag].values if flag in found else named.get(annotation.split(" ")[0], ())
                found[flag] = Flag(annotation, _choices(node.value), values)
    return found


def _named_values() -> dict[str, tuple]:
    """Return the values of transformers' enumerations by their names."""
    found: dict[str, tuple] = {}
    for node in (line for file in NAMED_VALUES for line in _parsed(file).body):
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["ExplicitEnum"]:
            assigned = [line.value for line in node.body if isinstance(line, ast.Assign)]
            found[node.name] = tuple(ast.literal_eval(value) for value in assigned)
    return found


def _parsed(file: str) -> ast.Module:
    package = file.split("/")[0]
    folder = Path(importlib.util.find_spec(package).origin).parent  # not imported
    return ast.parse((folder.parent / file).read_text(encoding="utf-8"))


def _choices(value: ast.expr | None) -> tuple:
    """Return the "choices" of a field's metadata."""
    for node in ast.walk(value) if value is not None else ():
        if isinstance(node, ast.Dict):
            for key, entry in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices":
                    with suppress(ValueError):
                        return tuple(ast.literal_eval(entry))
    return ()
