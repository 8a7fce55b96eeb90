"""A model of random weights from `--model_config`, refused in one line if it cannot be built or does not fit."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from launch.common.errors import UserError
from launch.common.library_patches import weightless
from launch.common.messages import did_you_mean, error_line
from launch.common.units import GIB
from launch.config.options import SftOptions
from launch.model.tensor_parallel.problem import split_problem
from launch.process.ranks import world_size

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
MOST_LAYERS = 4096  # each is Python objects even without its weights: these take seconds, a billion would take a week


def build_model(options: SftOptions, tokenizer, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """Build a causal LM. Raises `UserError` if transformers or this machine's memory cannot."""
    given = options.model_config
    assert isinstance(given, dict)
    config_class = _config_class(given)
    values = {name: value for name, value in given.items() if name != "model_type"}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    values = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | special | values
    attention = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    try:
        _check_sizes(values, config_class)
        _check_dtype(values)
        config = AutoConfig.for_model(given["model_type"], **values)
        _check_keys(given, config_class)
        _check_heads(config)
        _check_weightless(config, dtype, options.tp, attention)
        torch.manual_seed(seed)
        if not is_deepspeed_zero3_enabled():
            return AutoModelForCausalLM.from_config(config, dtype=dtype, **attention)
    except UserError:
        raise
    except Exception as error:  # a configuration can be wrong in more ways than transformers checks
        raise UserError(f"--model_config: {_reason(error, given)}") from None
    # the ranks partition the weights together, so an error here may be that another rank exited
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **attention)


def _config_class(given: dict) -> type[PreTrainedConfig]:
    model_type = given.get("model_type")
    if model_type is None:
        raise UserError("--model_config needs a model_type, for example llama")
    if model_type not in list(CONFIG_MAPPING):  # a list, since the value may not be hashable
        near = (
            did_you_mean(model_type, CONFIG_MAPPING) or "; those of transformers are lower-case names such as llama"
        )
        raise UserError(f"--model_config: unknown model_type {model_type!r}{near}")
    config_class = CONFIG_MAPPING[model_type]
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"--model_config: model_type {model_type!r} is not a causal LM; use one, such as llama")
    return config_class


def _check_sizes(values: dict, config_class: type[PreTrainedConfig]) -> None:
    for name, value in values.items():
        size = config_class.attribute_map.get(name, name)
        if size in SIZES and isinstance(value, int) and value < 1:
            raise UserError(f"--model_config: {name} must be at least 1, got {value}")
        if size == "num_hidden_layers" and isinstance(value, int) and value > MOST_LAYERS:
            raise UserError(f"--model_config: {name} must be at most {MOST_LAYERS}, got {value}")
        if name == "initializer_range" and isinstance(value, int | float) and not 0 <= value < math.inf:
            raise UserError(f"--model_config: {name} must be at least 0, got {value}")


def _check_dtype(values: dict) -> None:
    for name in ("dtype", "torch_dtype"):
        value = values.get(name)
        if value is not None and not isinstance(getattr(torch, str(value), None), torch.dtype):
            known = [key for key, kind in vars(torch).items() if isinstance(kind, torch.dtype)]
            raise UserError(
                f"--model_config: {name} must be one of torch's, got {value!r}{did_you_mean(value, known)}"
            )


def _check_keys(given: dict, config_class: type[PreTrainedConfig]) -> None:
    """Refuse a misspelt key, which transformers ignores silently."""
    known = config_class().to_dict().keys() | config_class.attribute_map.keys()
    for name in given.keys() - known:
        raise UserError(
            f"--model_config: unknown key {name!r} for {config_class.model_type}{did_you_mean(name, known)}"
        )


def _check_heads(config: PreTrainedConfig) -> None:
    """Refuse a number of heads that key-value heads do not divide; it would fail in the first forward."""
    text = config.get_text_config()
    heads, shared = (getattr(text, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise UserError(
            f"--model_config: num_attention_heads {heads} must be a multiple of num_key_value_heads {shared}"
        )


def _check_weightless(config: PreTrainedConfig, dtype: torch.dtype, tp: int, attention: dict[str, str]) -> None:
    """Build the model without weights, which finds most errors; refuse what `tp` ranks or memory cannot hold."""
    with weightless():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, **attention)
    if tp > 1 and (problem := split_problem(model, tp)):
        raise UserError(problem)
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    available = psutil.virtual_memory().total
    if needed > available * (world_size() if is_deepspeed_zero3_enabled() else 1):
        raise UserError(
            f"--model_config: {model.num_parameters():,} parameters take {needed / GIB:,.0f} GiB and this machine "
            f"has {available / GIB:,.0f}; choose smaller ones of vocab_size, hidden_size and num_hidden_layers"
        )


def _reason(error: Exception, given: dict) -> str:
    if isinstance(error, KeyError):  # a lookup of a name in a table; the error is the name alone
        for key, value in _leaves(given):
            if value == error.args[0]:
                return f"{key}: there is no {value!r}{did_you_mean(value, [*ACT2FN, *ROPE_INIT_FUNCTIONS])}"
    kind = "" if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: "
    return f"{kind}{error_line(error)}"


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else name)
    else:
        yield key, value
