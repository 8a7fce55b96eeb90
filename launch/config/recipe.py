"""Recipes: YAML files of the same keys as the flags, read into flags, and written beside a run."""

import json
from collections.abc import Hashable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launch.common.errors import UserError
from launch.config.options import SftOptions

if TYPE_CHECKING:
    from transformers import TrainingArguments

DEFAULT_RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "default.yaml"
# of this machine or this run alone, secret, or an argument that is no value
NOT_IN_A_RECIPE = {"recipe", "sanity", "preview", "output_dir", "use_cpu", "dataloader_pin_memory"} | {
    "data_workers",
    "data_cache",
}
# A recipe may come from somebody else. It never decides that a model's own code is run, or what leaves this machine.
FLAGS_ONLY = ("trust_remote_code", "push_to_hub", "hub_token", "trackio_space_id")
LOCAL_TRACKERS = {"none", "tensorboard"}  # the others of --report_to send what they are told to a server
NESTED_CODE = ("trust_remote_code", "auto_map", "attn_implementation", "_attn_implementation")


def recipe_argv(recipe: dict[Any, Any], path: Path) -> list[str]:
    """A recipe's keys and values as flags, so that they are held to the same types. Raises `UserError`."""
    argv = []
    for key, value in recipe.items():
        if key in ("recipe", "local_rank") or not isinstance(key, str):
            raise UserError(f"{path}: {key!r} is not a key of a recipe; remove it")
        if value is None:
            continue
        try:
            words = [_word(v) for v in (value if isinstance(value, list) else [value])]
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: {key} has a value that no flag can have: {error}") from None
        if "=" in key or any(word.startswith("--") for word in words):  # would be read as another flag
            raise UserError(f"{path}: {key!r} and its value {value!r} are not one setting; write `key: value`")
        argv += [f"--{key}", *words]
    return argv


def check_recipe_values(values: dict[str, Any], path: Path) -> None:
    """Raise `UserError` for a setting that only the command line can make, if a recipe turns it on."""
    for name in FLAGS_ONLY:
        if values.get(name):
            raise UserError(
                f"{path}: {name} is not accepted from a recipe, which may come from somebody else; remove it there "
                f"and give --{name} on the command line"
            )
    if sends := " ".join(sorted(_trackers(values.get("report_to")) - LOCAL_TRACKERS)):
        raise UserError(
            f"{path}: report_to {sends} sends a run's figures to a server, and is not accepted from a recipe; remove "
            f"it there and give --report_to {sends} on the command line"
        )
    for name, value in values.items():
        if found := _nested(value) & {*NESTED_CODE}:
            raise UserError(f"{path}: {name} names {min(found)}, which can run code from a hub; remove it")


def _trackers(report_to: str | list[str] | None) -> set[str]:
    return {report_to} if isinstance(report_to, str) else set(report_to or [])


def _nested(value: Any) -> set[str]:
    """Return the keys of all mappings in a value, which may be JSON text."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):  # refused where it is read
            return set()
    inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    own = {key for key in value if isinstance(key, str)} if isinstance(value, dict) else set()
    return own.union(*map(_nested, inside))


def resolved(options: SftOptions, training: "TrainingArguments", deepspeed: str | None) -> dict[str, Any]:
    """The settings of this run as a recipe that repeats it; `deepspeed`: the user's own file, if any."""
    from transformers import TrainingArguments  # slow to import, and not needed to read a recipe

    defaults = {f.name: f.default for f in fields(TrainingArguments)}
    changed = {name: value for name, value in training.to_dict().items() if defaults.get(name, MISSING) != value}
    values = asdict(options) | changed | {"deepspeed": deepspeed}
    left_out = {*NOT_IN_A_RECIPE, *FLAGS_ONLY}
    if _trackers(values.get("report_to")) - LOCAL_TRACKERS:
        left_out.add("report_to")
    return {name: v for name, v in values.items() if name not in left_out and v is not None and v != []}


class _Loader(yaml.SafeLoader):
    """`yaml.safe_load` that also refuses repeated keys, and aliases: a few lines of them make gigabytes."""

    def compose_node(self, parent: Any, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: aliases (*name) are not supported; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                line = node.value[index][0].start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: the key {key!r} is repeated")
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> tuple[dict[Any, Any], dict[Any, int]]:
    """Return a recipe's values and lines by key. Raises `UserError`."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        recipe = {} if node is None else loader.construct_document(node) or {}
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}; recipes/ holds the ones that come with this project") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not a readable YAML file: {error}") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(recipe).__name__}")
    return recipe, {key.value: key.start_mark.line + 1 for key, _ in node.value} if recipe else {}


def _word(value: Any) -> str:
    """A recipe's value as it is written on a command line."""
    if isinstance(value, dict | list):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
