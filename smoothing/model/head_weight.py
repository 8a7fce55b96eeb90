"""Which module is a model's output head, and the linear map that it computes: PEFT wraps it, DeepSpeed replaces it.

PEFT is recognised by what its modules have, so that it need not be installed.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LinearMap(NamedTuple):
    """What gives the logits: `hidden · weightᵀ + bias`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def acting_head(model: Any) -> Any:
    """Return the module that computes the logits: in PEFT's `ModulesToSaveWrapper` the copy that is trained.

    What the first FSDP wraps: its forward runs inside of the wrapper's, where its weight is whole.
    """
    lm_head = model.get_output_embeddings()
    lm_head = getattr(lm_head, "_fsdp_wrapped_module", lm_head)
    if not (hasattr(lm_head, "modules_to_save") and hasattr(lm_head, "original_module")):
        return lm_head
    active = (
        []
        if lm_head.disable_adapters
        else [name for name in lm_head.active_adapters if name in lm_head.modules_to_save]
    )
    return lm_head.modules_to_save[active[0]] if active else lm_head.original_module


def is_sharded(lm_head: Any) -> bool:
    """Return whether this output head is DeepSpeed's, which gives a rank's own logits."""
    return getattr(lm_head, "is_vocab_parallel_lm_head", False)


def linear_problem(lm_head: Any) -> str | None:
    """Return why this output head is no linear map that a loss can compute in its place, or None."""
    kind = type(lm_head)
    if is_sharded(lm_head) or _is_linear(lm_head) or (_is_lora(lm_head) and _is_linear(lm_head.base_layer)):
        return None
    if kind.__module__.startswith("deepspeed."):
        return (
            f"DeepSpeed has left this output head whole or split it its own way ({kind.__name__}): set "
            '"vocab_parallel_lm_head": true in the section "tensor_parallel" of its configuration, so that each rank '
            "keeps its share of the logits; head='sharded' takes the logits that DeepSpeed gathers"
        )
    return (
        f"head='fused' needs an output head that is a plain nn.Linear (FSDP, DTensor and LoRA included) or "
        f"DeepSpeed's VocabParallelLinear, got {kind.__name__}; use head='sharded'"
    )


def linear_map(lm_head: Any, hidden: Tensor) -> LinearMap:
    """Return the map of a head that has no `linear_problem`, LoRA's part of it in further columns of the weight.

    h·Wᵀ + s·(h·Aᵀ)·Bᵀ = [h, s·h·Aᵀ] · [W, B]ᵀ
    """
    if not _is_lora(lm_head):
        return LinearMap(hidden, lm_head.weight, lm_head.bias)
    base = lm_head.base_layer
    bias, columns, rows = base.bias, [hidden], [base.weight]
    names = [] if lm_head.disable_adapters or lm_head.merged else lm_head.active_adapters
    for name in names:
        if name not in lm_head.lora_A:
            continue
        down, up, scaling = lm_head.lora_A[name], lm_head.lora_B[name], lm_head.scaling[name]
        given = lm_head.lora_dropout[name](hidden.to(down.weight.dtype))
        columns.append((down(given) * scaling).to(hidden.dtype))
        rows.append(up.weight.to(base.weight.dtype))
        if up.bias is not None:
            bias = up.bias * scaling if bias is None else bias + up.bias * scaling
    return (
        LinearMap(torch.cat(columns, -1), torch.cat(rows, 1), bias) if names else LinearMap(hidden, base.weight, bias)
    )


def _is_linear(module: Any) -> bool:
    """Whether its class computes what `nn.Linear` does, as those do that FSDP derives from it."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _is_lora(module: Any) -> bool:
    """Whether this is PEFT's plain LoRA around a layer; its variants (DoRA) compute something else."""
    kind = type(module)
    lora = kind.__module__ == "peft.tuners.lora.layer" and kind.__name__ == "Linear"
    return lora and not getattr(module, "lora_variant", None)
