"""Give DeepSpeed the split of a run's model."""

from typing import Any

from transformers import PreTrainedModel

from launch.model.tensor_parallel.prepare import keep_whole, rename_scaled
from launch.model.tensor_parallel.split import Split, plan_split
from launch.process.ranks import say

OWN = ("partition_config", "preset_model")  # a user's file may say how to split


def split_model(model: PreTrainedModel, section: dict[str, Any]) -> Split | None:
    """Put the model's split into the `tensor_parallel` section of a DeepSpeed configuration, and prepare the model.

    Returns the split, or None if the section has a user's own. Call it before DeepSpeed's `initialize`.
    """
    rename_scaled(model)
    if any(section.get(name) for name in OWN):
        return None
    split = plan_split(model)
    section["partition_config"] = split.partition_config
    keep_whole(model, split)
    say(f"tensor parallelism of {model.config.model_type}: {split}")
    return split
