"""Give DeepSpeed the split of a run's model."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from launch.common.library_patches import look_inside_adapters
from launch.config.deepspeed import OWN_SPLITS
from launch.model.adapters import is_adapted
from launch.model.tensor_parallel.adapters import with_factors
from launch.model.tensor_parallel.prepare import keep_whole, rename_scaled
from launch.model.tensor_parallel.split import Split, plan_split
from launch.process.ranks import say


def split_model(model: PreTrainedModel, section: dict[str, Any]) -> Split | None:
    """Put the model's split into the `tensor_parallel` section of a DeepSpeed configuration, and prepare the model.

    Returns the split, or None if the section has a user's own. Call it before DeepSpeed's `initialize`.
    """
    rename_scaled(model)
    if has_own_split(section):
        return None
    split = plan_split(model)
    section["partition_config"] = split.partition_config
    keep_whole(model, split)
    say(f"tensor parallelism of {model.config.model_type}: {split}")
    return split


def has_own_split(section: dict[str, Any]) -> bool:
    """Return whether a user's DeepSpeed file says in `tensor_parallel` how to split the model."""
    return any(section.get(name) for name in OWN_SPLITS)


def split_adapters(section: dict[str, Any], split: Split) -> None:
    """Have DeepSpeed split the adapters too that were put into a model after `split_model`."""
    section["partition_config"] = split.partition_config | {"layer_specs": with_factors(split.specs)}
    look_inside_adapters()


def finish_adapters(model: nn.Module) -> None:
    """Make DoRA and dropout of adapters take their part beside the layers that DeepSpeed has split in a model.

    Call it after DeepSpeed's `initialize`; without adapters or split layers nothing changes.
    """
    if not is_adapted(model):
        return
    from deepspeed.module_inject.layers import LinearAllreduce, TensorParallel_Layer
    from peft.tuners.lora import LoraLayer

    from launch.model.tensor_parallel.dora import SplitDora
    from launch.model.tensor_parallel.dropout import DropoutOfAPart

    for adapted in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        layer, dropout = adapted.get_base_layer(), adapted.lora_dropout
        if isinstance(layer, TensorParallel_Layer):
            for dora in adapted.lora_magnitude_vector.values():
                dora.__class__ = SplitDora
        if isinstance(layer, LinearAllreduce):
            for name in [name for name, each in dropout.items() if isinstance(each, nn.Dropout)]:
                dropout[name] = DropoutOfAPart(dropout[name].p, layer._partition_sizes, layer.tp_index)
