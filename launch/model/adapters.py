"""Adapters: LoRA and DoRA of peft, trained beside a frozen model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from launch.common.errors import UserError
from launch.common.messages import counted, did_you_mean, error_line
from launch.config.options import SftOptions
from launch.process.ranks import say

if TYPE_CHECKING:
    from peft import PeftModel

ALL_LINEAR = "all-linear"
LINEAR = (nn.Linear, Conv1D)
ADAPTER_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."  # of the names of weights


def with_adapter(
    model: PreTrainedModel, options: SftOptions, seed: int, quiet: bool = False
) -> "PreTrainedModel | PeftModel":
    """Return the model with adapters of `--lora_rank` in it and all else frozen; as it is without that flag.

    Unless `quiet`, print what is trained. Adapters are drawn from `seed` alike on all ranks, in the model's dtype.
    Raises `UserError` if peft is missing or cannot adapt the layers of `--lora_targets`.

    Collectives:
        Under ZeRO 3 with `--dora`, those that gather each layer's weight.
    """
    if not options.lora_rank:
        return model
    try:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    except ImportError:
        raise UserError("--lora_rank needs peft, which is not installed: pip install peft") from None
    if problem := targets_problem(model, options.lora_targets):
        raise UserError(problem)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        lora_dropout=options.lora_dropout,
        target_modules=ALL_LINEAR if _all_linear(options.lora_targets) else options.lora_targets,
        use_dora=options.dora,
    )
    if options.load_in_4bit:
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # Trainer turns that on
    torch.manual_seed(seed)
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        given = [flag for flag, on in (("--dora", options.dora), ("--lora_dropout", options.lora_dropout)) if on]
        way_out = f"; leave out {' and '.join(given)}, or name layers that are not experts by --lora_targets"
        raise UserError(
            f"--lora_rank: peft cannot adapt {type(model).__name__}: {error_line(error)}{way_out if given else ''}"
        ) from None
    # get_peft_model puts the model's own name there, which may be a relative path
    adapted.peft_config["default"].base_model_name_or_path = _address(options.model)
    if not quiet:
        say(_described(adapted, options))
    return adapted


def adapter_as_model(model: str) -> str:
    """Return the sentence about an adapter that was named as `--model`, which transformers would add to its base."""
    return (
        f"--model {model} is an adapter, not a model; merge it into its base first (a run with --merge_adapter true "
        "exports a whole model, and peft's merge_and_unload makes one), or train it further by "
        "--resume_from_checkpoint of its run"
    )


def is_adapted(model: Any) -> bool:
    """Return whether only adapters of this model are trained."""
    return hasattr(model, "peft_config")


def targets_problem(model: PreTrainedModel, targets: list[str] | None) -> str | None:
    """Return why these layers cannot be adapted, or None."""
    if _all_linear(targets):
        return None
    head = model.get_output_embeddings()
    names = {name: module for name, module in model.named_modules() if name}
    linear = {
        name.split(".")[-1] for name, module in names.items() if isinstance(module, LINEAR) and module is not head
    }
    offer = f"; those of {type(model).__name__} are {', '.join(sorted(linear))}"
    for target in targets or ():
        found = [module for name, module in names.items() if name == target or name.endswith(f".{target}")]
        if not found:
            return f"--lora_targets: no layer is named {target!r}{did_you_mean(target, linear) or offer}"
        if any(module is head for module in found):
            return f"--lora_targets: {target} is the output head, which computes the loss and is not adapted{offer}"
        if not all(isinstance(module, LINEAR) for module in found):
            return f"--lora_targets: {target} is a {type(found[0]).__name__}, no linear layer{offer}"
    return None


def _all_linear(targets: list[str] | None) -> bool:
    return targets in (None, [], [ALL_LINEAR])


def _address(model: str) -> str:
    """Return where to find the model from any directory; a hub name stays as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _described(adapted: "PeftModel", options: SftOptions) -> str:
    layers = adapted.targeted_module_names
    trained, total = adapted.get_nb_trainable_parameters()
    kinds = ", ".join(sorted({name.split(".")[-1] for name in layers}))
    return (
        f"adapter: {'DoRA' if options.dora else 'LoRA'} of rank {options.lora_rank} in "
        f"{counted(len(layers), 'layer')} ({kinds}); {trained:,} of {total:,} parameters are trained"
    )
