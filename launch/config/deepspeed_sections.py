"""Checks of single sections of a DeepSpeed file, for what DeepSpeed itself takes silently: types, names, "auto"."""

import inspect
import json
from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lamb import FusedLamb
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS
from pydantic import BaseModel, ValidationError

from launch.common.errors import UserError
from launch.common.messages import did_you_mean

AUTO = "auto"
# what transformers fills in (HfTrainerDeepSpeedConfig); any other "auto" would reach an optimizer as a word
FILLED_OPTIMIZER = {"lr", "betas", "eps", "weight_decay"}
FILLED_SCHEDULER = {"warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"}
CHOICES = ("stage", "device")  # DeepSpeed drops an "auto" here, and silently uses its default
NEEDS_MUP = ("muadam", "muadamw", "musgd")
# the classes of DeepSpeedEngine._configure_basic_optimizer
OPTIMIZERS = {
    **dict.fromkeys(("adam", "adamw"), FusedAdam),
    "adagrad": torch.optim.Adagrad,
    "lamb": FusedLamb,
    "lion": FusedLion,
}
OFFLOADED_OPTIMIZERS = OPTIMIZERS | {
    **dict.fromkeys(("adam", "adamw"), DeepSpeedCPUAdam),
    "adagrad": DeepSpeedCPUAdagrad,
    "lion": DeepSpeedCPULion,
}
ADAM_SWITCHES = {"torch_adam": False, "adam_w_mode": True, "fp32_optimizer_states": True}  # DeepSpeed's own


def unknown_key(source: str, name: str, known: Iterable[str]) -> UserError:
    return UserError(f"{source}: unknown key {name!r}{did_you_mean(name, known)}")


def check_type(value: Any, default: Any, source: str) -> None:
    """Raise `UserError` unless `value` is of the type that DeepSpeed's default shows; None shows nothing."""
    kind = _kind(default)
    if kind and _kind(value) != kind:
        raise UserError(f"{source} must be {kind}, got {_shown(value)}")


def check_section(given: Any, defaults: dict[str, Any], source: str) -> None:
    """Check a section that DeepSpeed reads key by key: its names and types are those of `defaults`."""
    check_type(given, {}, source)
    for name, value in given.items():
        if name not in defaults:
            raise unknown_key(source, name, defaults)
        check_type(value, defaults[name], f"{source}.{name}")


def check_model(model: type[BaseModel], given: Any, source: str) -> None:
    """Check a section that DeepSpeed reads with a pydantic model, which refuses unknown keys and wrong choices.

    Stricter than the model: `"yes"`, `1` and `"2"` are no booleans and no numbers, as transformers reads the same
    section and takes them literally.
    """
    check_type(given, {}, source)
    try:
        made = model(**given)
    except ValidationError as error:
        raise _model_error(error, model, source) from None
    except Exception as error:  # two names of one thing
        raise UserError(f"{source}: {error}") from None
    _check_types(made, given, source)


def check_optimizer(given: Any, offloaded: bool, source: str) -> None:
    """Check the type and the parameters, which DeepSpeed reads only once it has the model."""
    kind, params = _type_and_params(given, {"legacy_fusion": False}, source)
    lower = kind.lower()
    known = {*DEEPSPEED_OPTIMIZERS, *_classes(torch.optim, torch.optim.Optimizer)}
    if lower in NEEDS_MUP:
        raise UserError(
            f"{source}.type {kind!r} needs the package mup, which this project does not install; use another"
        )
    if kind not in known and lower not in DEEPSPEED_OPTIMIZERS:
        raise UserError(f"{source}.type: no optimizer is named {kind!r}{did_you_mean(kind, known)}")
    if "max_grad_norm" in params:
        raise UserError(f"{source}.params.max_grad_norm: set max_grad_norm in the recipe instead")
    if lower == "muon":  # its keys are spread over two optimizers, and importing it compiles kernels
        return
    switches = ADAM_SWITCHES if lower in ("adam", "adamw") else {}
    if switches and params.get("torch_adam"):
        made: type = torch.optim.AdamW
    else:
        made = (OFFLOADED_OPTIMIZERS if offloaded else OPTIMIZERS).get(lower) or getattr(torch.optim, kind)
    _check_params(params, _parameters(made) | switches, FILLED_OPTIMIZER, f"{source}.params")


def check_scheduler(given: Any, source: str) -> None:
    """Check the type and the parameters, which DeepSpeed reads only once it has the optimizer."""
    kind, params = _type_and_params(given, {}, source)
    classes = _classes(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
    classes |= {name: getattr(lr_schedules, name) for name in lr_schedules.VALID_LR_SCHEDULES}
    if kind not in classes:
        raise UserError(f"{source}.type: no scheduler is named {kind!r}{did_you_mean(kind, classes)}")
    defaults = _parameters(classes[kind])
    for name, default in defaults.items():
        if default is inspect.Parameter.empty and name not in params:
            auto = ', "auto" for example' if name in FILLED_SCHEDULER else ""
            raise UserError(f"{source}.params: {kind} needs {name}{auto}")
        if isinstance(params.get(name), list):  # one value for each group of parameters
            defaults[name] = None
    _check_params(params, defaults, FILLED_SCHEDULER, f"{source}.params")


def _kind(value: Any) -> str | None:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, tuple) or (isinstance(value, list) and all(_kind(item) == "a number" for item in value)):
        return f"a list of {len(value)} numbers"
    if isinstance(value, str):
        return "a string"
    return "an object" if isinstance(value, dict) else None


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, default=str)
    except RecursionError:
        return "something nested too deeply"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _model_error(error: ValidationError, model: type[BaseModel], source: str) -> UserError:
    """The first of pydantic's errors in one line, with the key in front."""
    first = error.errors()[0]
    *parents, name = [source, *map(str, first["loc"])]
    if first["type"] == "extra_forbidden":
        return unknown_key(".".join(parents), name, _fields(model) if len(parents) == 1 else ())
    key = ".".join([*parents, name])
    if "error" in first.get("ctx", {}):  # from a validator of DeepSpeed's own
        return UserError(f"{key}: {first['ctx']['error']}")
    return UserError(f"{key}: {first['msg']}, got {_shown(first['input'])}")


def _fields(model: type[BaseModel]) -> dict[str, str]:
    """Map each name that a file may use to the field of the model."""
    return {name: key for key, field in model.model_fields.items() for name in (key, field.alias or key)}


def _check_types(made: BaseModel, given: dict, source: str) -> None:
    fields = _fields(type(made))
    for name, value in given.items():
        if name not in fields:  # "strict", an argument of DeepSpeed's models
            raise unknown_key(source, name, fields)
        read = getattr(made, fields[name], None)
        if value == AUTO and name in CHOICES:
            raise _not_filled(f"{source}.{name}")
        if isinstance(read, BaseModel) and isinstance(value, dict):
            _check_types(read, value, f"{source}.{name}")
        elif isinstance(read, int | float) and value is not None and value != AUTO:
            check_type(value, read, f"{source}.{name}")


def _type_and_params(given: Any, others: dict[str, Any], source: str) -> tuple[str, dict]:
    check_section(given, {"type": "", "params": {}} | others, source)
    check_type(given.get("type"), "", f"{source}.type")
    return given["type"], given.setdefault("params", {})


def _classes(module, base: type) -> dict[str, type]:
    found = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    return {name: value for name, value in found.items() if issubclass(value, base) and value is not base}


def _parameters(made: type) -> dict[str, Any]:
    """Parameters of `made` and their defaults, without the first, which is the weights or the optimizer."""
    parameters = list(inspect.signature(made).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.name not in ("last_batch_iteration", "last_epoch")}


def _check_params(params: dict, defaults: dict[str, Any], filled: set[str], source: str) -> None:
    autos = {name for name, value in params.items() if value == AUTO}
    check_section(params, defaults | dict.fromkeys(autos & defaults.keys()), source)
    for name in sorted(autos - filled):
        raise _not_filled(f"{source}.{name}")


def _not_filled(key: str) -> UserError:
    return UserError(f'{key} cannot be "auto": nothing fills it in; give a value or leave it out')
