"""The weights that a run trains, from all ranks, without those that are frozen beside them."""

from deepspeed import DeepSpeedEngine
from deepspeed.module_inject.layers import GatherReplacedLayerParams
from torch import Tensor


def trained_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Return them by name, whole on rank 0. All ranks must call this.

    Collectives:
        One all-gather for each weight that tensor-parallel ranks share; under ZeRO 3 those of DeepSpeed.
    """
    if engine.zero_optimization_stage() == 3:
        return engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True) or {}
    weights: dict[str, Tensor] = {}
    for prefix, module in engine.module.named_modules():
        own = {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}
        with GatherReplacedLayerParams(list(own.values()), module):
            weights |= {f"{prefix}.{name}": p.detach().cpu() for name, p in own.items()}
    return weights
