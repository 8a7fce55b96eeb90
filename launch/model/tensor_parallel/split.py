"""The split of a model: what transformers' plan says of its layers, where that is safe, and the head in any case.

A plan names linear layers: `layers.*.self_attn.q_proj: colwise`. Layers are split by blocks, the modules that hold
them (`self_attn`, `mlp`): the first layers of a block give each rank its own part, the last one sums the parts. A
block that holds any weight that the plan does not name stays whole on all ranks, since that weight would be applied
to a part, and its gradient would be one rank's alone. The head's vocabulary is split always.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from launch.model.tensor_parallel.kinds import ADDED_PLANS, SHOWN

GATHERED = {"colwise_gather_output", "rowwise_split_input"}
PARALLEL = {"colwise", "rowwise"}
SUMMED = "replicated_with_grad_allreduce"
TWO_IN_ONE = {"gate_up_proj": "colwise_gather_output", "down_proj": "rowwise_split_input"}
NOTHING = {"patterns": ["^nothing$"], "partition_type": "skip"}  # DeepSpeed wants at least one


@dataclass(frozen=True)
class Split:
    """How a model is split. Names are those of modules, with `*` for the number of a layer.

    Attributes:
        parallel: Blocks whose layers hand parts of their output on, and sum them at the end.
        gathered: Blocks in which each layer's output is gathered, so that all between the layers is whole.
        specs: DeepSpeed's `layer_specs`.
    """

    parallel: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    specs: list[dict[str, Any]] = field(default_factory=lambda: [NOTHING])

    def __str__(self) -> str:
        parts = [f"{name} split" for name in self.parallel] + [f"{name} split and gathered" for name in self.gathered]
        return ", ".join([*parts, "head and its loss split"]) + ("" if parts else "; all else is whole on every rank")

    @property
    def partition_config(self) -> dict[str, Any]:
        """DeepSpeed's `tensor_parallel.partition_config`."""
        return {"use_default_specs": False, "layer_specs": self.specs}


def plan_split(model: PreTrainedModel) -> Split:
    """Return the split of a model, which may be on the meta device or partitioned by ZeRO 3."""
    plan = _plan(model)
    blocks: dict[str, list[tuple[str, dict[str, str | None]]]] = defaultdict(list)
    for name, module in model.named_modules():
        styles = _styles(name, module, plan)
        if any(style in GATHERED | PARALLEL for style in _direct(styles).values()):
            blocks[general(name)].append((name, styles))
    parallel: list[str] = []
    gathered: list[str] = []
    specs: list[dict[str, Any]] = []
    for block, found in blocks.items():
        made = [_block_specs(block, styles) for _, styles in found]
        if made[0] is None or any(other != made[0] for other in made):
            continue
        (gathered if made[0][0] else parallel).append(block)
        specs += made[0][1]
    return Split(tuple(parallel), tuple(gathered), specs or [NOTHING])


def _plan(model: PreTrainedModel) -> dict[str, str]:
    """Map the full names of modules to styles; empty unless the model is of a kind that is shown to be right."""
    config = model.config
    if config.model_type not in SHOWN or not type(model).__module__.startswith("transformers."):
        return {}
    own: Mapping[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    plan = {**own, **ADDED_PLANS.get(config.model_type, {})}
    return {f"{model.base_model_prefix}.{name}": style for name, style in plan.items()}


def general(name: str) -> str:
    """Return the name of a module with `*` for the number of its layer."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _styles(name: str, block: nn.Module, plan: dict[str, str]) -> dict[str, str | None]:
    """Map each module in a block that has weights of its own to its style, None without one."""
    styles: dict[str, str | None] = {}
    for path, module in block.named_modules():
        if path and next(module.parameters(recurse=False), None) is not None:
            style = plan.get(general(f"{name}.{path}"))
            styles[path] = style if isinstance(module, nn.Linear) or style == SUMMED else None
    return styles


def _direct(styles: dict[str, str | None]) -> dict[str, str | None]:
    return {path: style for path, style in styles.items() if "." not in path}


def _block_specs(block: str, styles: dict[str, str | None]) -> tuple[bool, list[dict[str, Any]]] | None:
    """Return whether a block's outputs are gathered, and its specs, or None if it stays whole."""
    if styles == TWO_IN_ONE:
        halves = _spec(block, "gate_up_proj", "column") | {"shape": [2, -1], "partition_dim": 0}
        return False, [halves, _spec(block, "down_proj", "row")]
    linear = {path: style for path, style in _direct(styles).items() if style in GATHERED | PARALLEL}
    if set(linear.values()) <= GATHERED:
        return True, [_spec(block, path, "column") | {"gather_output": True} for path in linear]
    if _direct(styles) == styles and set(styles.values()) <= PARALLEL | {SUMMED}:
        kinds = {"colwise": "column", "rowwise": "row"}
        specs = [_spec(block, path, kinds[style]) for path, style in linear.items() if style in kinds]
        summed = [path for path, style in styles.items() if style == SUMMED]
        return False, specs + [_spec(block, path, "skip") | {"grad_allreduce": True} for path in summed]
    return None


def _spec(block: str, path: str, kind: str) -> dict[str, Any]:
    name = re.escape(f"{block}.{path}").replace(r"\*", r"\d+")
    return {"patterns": [rf"(.*\.)?{name}\.weight$"], "partition_type": kind}
