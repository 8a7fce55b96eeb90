"""Sections of a DeepSpeed file, held to DeepSpeed's own models and signatures: their keys, types and choices."""

import inspect
import json
import re
from collections.abc import Iterable
from enum import Enum
from typing import Any, get_args

import torch
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from launch.common.errors import UserError
from launch.common.messages import did_you_mean

AUTO = "auto"
# what transformers fills in (HfTrainerDeepSpeedConfig); any other "auto" would reach an optimizer as a word
FILLED = {
    "optimizer": {"lr", "betas", "eps", "weight_decay"},
    "scheduler": {"warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"},
}
NEEDS_MUP = {"muadam", "muadamw", "musgd"}
ADAM_SWITCHES = {"torch_adam": False, "adam_w_mode": True, "fp32_optimizer_states": True}  # DeepSpeed's own
SWITCHES = {"adam": ADAM_SWITCHES, "adamw": ADAM_SWITCHES}


def unknown_key(source: str, name: str, known: Iterable[str]) -> UserError:
    return UserError(f"{source}: unknown key {name!r}{did_you_mean(name, known)}")


def check_object(given: Any, source: str) -> None:
    if not isinstance(given, dict):
        raise UserError(f"{source} must be an object, got {_shown(given)}")


def check_like(value: Any, default: Any, source: str) -> None:
    """Whether `value` is of the type that DeepSpeed's default shows; None shows nothing."""
    if isinstance(default, bool):
        fits, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, int | float):
        fits, kind = _is_number(value), "a number"
    elif isinstance(default, str):
        fits, kind = isinstance(value, str), "a string"
    elif isinstance(default, dict):
        fits, kind = isinstance(value, dict), "an object"
    elif isinstance(default, tuple):
        count = len(default)
        fits = isinstance(value, list) and len(value) == count and all(map(_is_number, value))
        kind = f"a list of {count} numbers"
    else:
        return
    if not fits:
        raise UserError(f"{source} must be {kind}, got {_shown(value)}")


def check_plain(given: Any, defaults: dict[str, Any], source: str) -> None:
    """A section that DeepSpeed reads key by key, with a default for each."""
    check_object(given, source)
    for name, value in given.items():
        if name not in defaults:
            raise unknown_key(source, name, defaults)
        check_like(value, defaults[name], f"{source}.{name}")


def check_model(model: type[BaseModel], given: Any, source: str) -> None:
    """A section that DeepSpeed reads with a pydantic model.

    Stricter than that: `"yes"`, `1` and `"2"` are no booleans and no numbers, as transformers reads the same section
    and takes them for what they are.
    """
    check_object(given, source)
    _check_names(model, given, source)
    # an "auto" becomes DeepSpeed's default, or the recipe's value
    without_auto = {name: value for name, value in given.items() if value != AUTO}
    try:
        made = model(**without_auto)
    except ValidationError as error:
        raise UserError(_sentence(error.errors()[0], source)) from None
    except Exception as error:  # two names of one thing
        raise UserError(f"{source}: {error}") from None
    _check_types(made, without_auto, source)


def check_optimizer(given: Any, offloaded: bool, source: str) -> None:
    kind, params = _type_and_params(given, source, {"legacy_fusion"})
    known = {*DEEPSPEED_OPTIMIZERS, *_classes(torch.optim, torch.optim.Optimizer)}
    if kind.lower() in NEEDS_MUP:
        raise UserError(
            f"{source}.type {kind!r} needs the package mup, which this project does not install; name another"
        )
    if kind not in known and kind.lower() not in DEEPSPEED_OPTIMIZERS:
        raise UserError(f"{source}.type: no optimizer is named {kind!r}{did_you_mean(kind, known)}")
    if "legacy_fusion" in given:
        check_like(given["legacy_fusion"], False, f"{source}.legacy_fusion")
    if "max_grad_norm" in params:
        raise UserError(f"{source}.params.max_grad_norm: set max_grad_norm in the recipe instead")
    if kind.lower() != "muon":  # its keys are spread over two optimizers, and importing it compiles kernels
        defaults = _parameters(_optimizer(kind, bool(params.get("torch_adam")), offloaded))
        defaults |= SWITCHES.get(kind.lower(), {})
        _check_params(params, defaults, "optimizer", f"{source}.params")


def check_scheduler(given: Any, source: str) -> None:
    kind, params = _type_and_params(given, source, set())
    classes = _classes(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
    classes |= {name: getattr(lr_schedules, name) for name in lr_schedules.VALID_LR_SCHEDULES}
    if kind not in classes:
        raise UserError(f"{source}.type: no scheduler is named {kind!r}{did_you_mean(kind, classes)}")
    defaults = _parameters(classes[kind])
    _check_params(params, defaults, "scheduler", f"{source}.params")
    for name, default in defaults.items():
        if default is inspect.Parameter.empty and name not in params:
            auto = ', "auto" for example' if name in FILLED["scheduler"] else ""
            raise UserError(f"{source}.params: {kind} needs {name}{auto}")


def _check_names(model: type[BaseModel], given: dict, source: str) -> None:
    fields = _fields(model)
    for name, value in given.items():
        if name not in fields:
            raise unknown_key(source, name, fields)
        annotation = model.model_fields[fields[name]].annotation
        nested = _class_in(annotation, BaseModel)
        if nested and isinstance(value, dict):
            _check_names(nested, value, f"{source}.{name}")
        choices = _class_in(annotation, Enum)
        if choices and value == AUTO:  # never filled in: DeepSpeed would silently use its default
            known = ", ".join(str(choice.value) for choice in choices)
            raise UserError(f'{source}.{name} must be one of {known}, got "auto"')


def _fields(model: type[BaseModel]) -> dict[str, str]:
    """Names that a file may use, and the field that each is for."""
    return {name: key for key, field in model.model_fields.items() for name in (key, field.alias or key)}


def _class_in(annotation: Any, base: type) -> Any:
    """The subclass of `base` that `annotation` is, or is an Optional of."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, base):
            return part
    return None


def _check_types(made: BaseModel, given: dict, source: str) -> None:
    fields = _fields(type(made))
    for name, value in given.items():
        got = getattr(made, fields[name], None)
        if isinstance(got, BaseModel) and isinstance(value, dict):
            _check_types(got, value, f"{source}.{name}")
        elif isinstance(got, int | float) and value is not None and value != AUTO:
            if isinstance(got, bool) and not isinstance(value, bool):
                raise UserError(f"{source}.{name} must be true or false, got {_shown(value)}")
            if not isinstance(got, bool) and not _is_number(value):
                kind = "an integer" if isinstance(got, int) else "a number"
                raise UserError(f"{source}.{name} must be {kind}, got {_shown(value)}")


def _sentence(error: ErrorDetails, source: str) -> str:
    """What pydantic says of one value, with the key in front."""
    key = ".".join([source, *map(str, error["loc"])])
    kind, _, rest = error["msg"].partition(", ")
    if kind in ("Value error", "Assertion failed"):
        return f"{key}: {rest.removeprefix(key.split(': ')[-1]).strip()}"
    if error["type"] == "model_type":
        return f"{key} must be an object, got {_shown(error['input'])}"
    expected = error["msg"].replace("Input should be", "must be")
    choices = []
    if error["type"] in ("enum", "literal_error"):  # of stages pydantic counts the largest twice
        choices = [*dict.fromkeys(re.findall(r"\w+", error["ctx"]["expected"].replace(" or ", " ")))]
        expected = f"must be one of {', '.join(choices)}"
    return f"{key} {expected}, got {_shown(error['input'])}{did_you_mean(error['input'], choices)}"


def _type_and_params(given: Any, source: str, others: set[str]) -> tuple[str, dict]:
    check_object(given, source)
    known = {"type", "params"} | others
    for name in given:
        if name not in known:
            raise unknown_key(source, name, known)
    if not isinstance(given.get("type"), str):
        raise UserError(f"{source}.type must be a name, got {_shown(given.get('type'))}")
    params = given.setdefault("params", {})
    check_object(params, f"{source}.params")
    return given["type"], params


def _optimizer(kind: str, torch_adam: bool, offloaded: bool) -> type:
    """The class that DeepSpeedEngine._configure_basic_optimizer takes for this name."""
    from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

    adam = torch.optim.AdamW if torch_adam else DeepSpeedCPUAdam if offloaded else FusedAdam
    own = {
        "adam": adam,
        "adamw": adam,
        "adagrad": DeepSpeedCPUAdagrad if offloaded else torch.optim.Adagrad,
        "lamb": FusedLamb,
        "lion": DeepSpeedCPULion if offloaded else FusedLion,
    }
    return own.get(kind.lower()) or getattr(torch.optim, kind)


def _classes(module, base: type) -> dict[str, type]:
    found = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    return {name: value for name, value in found.items() if issubclass(value, base) and value is not base}


def _parameters(made: type) -> dict[str, Any]:
    """What can be given to `made`, with its defaults; the first is the weights, or the optimizer."""
    parameters = list(inspect.signature(made).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.name not in ("last_batch_iteration", "last_epoch")}


def _check_params(params: dict, defaults: dict[str, Any], section: str, source: str) -> None:
    for name, value in params.items():
        if name not in defaults:
            raise unknown_key(source, name, defaults)
        if value == AUTO and name in FILLED[section]:
            continue
        if value == AUTO:
            raise UserError(f'{source}.{name} cannot be "auto": nothing fills it in; give a value or leave it out')
        if isinstance(value, list) and not isinstance(defaults[name], tuple) and section == "scheduler":
            continue  # one value for each group of parameters
        check_like(value, defaults[name], f"{source}.{name}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, default=str)
    except RecursionError:
        return "something nested too deeply"
    return text if len(text) <= 60 else f"{text[:60]}..."
