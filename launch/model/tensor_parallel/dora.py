"""DoRA beside layers that tensor-parallel ranks share.

DoRA gives a layer the weight m·(W + s·B·A)/‖W + s·B·A‖, with a magnitude m and a length ‖·‖ for each row, that is,
each output; the length counts as a constant in the gradient. peft takes a layer's weight for the whole one. Here each
rank has its part of W and of A or B, and m whole, which is trained alike on all:

- Beside a column-parallel layer a rank has whole rows, and takes the magnitudes of its own. Their gradient is summed
  over the ranks, so that every rank has that of all of m.
- Beside a column-parallel layer whose output is gathered, the lengths are gathered as well.
- Beside a row-parallel layer a rank has a part of each row: the squares of the lengths are summed over the ranks.
"""

import torch
import torch.distributed as dist
from deepspeed.module_inject.layers import (
    ColumnParallel,
    LinearAllreduce,
    LinearLayer,
    SubParamLinearLayer,
    TensorParallel_Layer,
)
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor


class SplitDora(DoraLinearLayer):
    """peft's DoRA beside a layer that is split. `weight` is m, [outputs], whole on every rank.

    Collectives (a forward pass):
        Row-parallel: one all-reduce of [outputs]. Gathered: one all-gather of [outputs], two with a bias.
        Otherwise none. With dropout also those of the layer itself, which is applied once more.
    Collectives (a backward pass):
        Column-parallel: one all-reduce of [outputs].
    """

    def forward(self, x, *, lora_A, lora_B, scaling, base_layer, base_result=None, adapter_name="default"):
        if base_result is None:  # after dropout x is another than the layer was given
            base_result = base_layer(x)
        length, bias = _lengths(base_layer, lora_A.weight, lora_B.weight, scaling), base_layer.bias
        magnitude = self.weight
        if getattr(base_layer, "gather_output", False):
            length = _gathered(base_layer, length)
            bias = None if bias is None else _gathered(base_layer, bias)
        elif not isinstance(base_layer, LinearAllreduce):
            magnitude = _own(base_layer, ColumnParallel.apply(base_layer.mp_group, magnitude))
        scale = magnitude / length.to(magnitude.dtype)
        unbiased = base_result if bias is None else base_result - bias
        return (scale - 1) * unbiased + scale * lora_B(lora_A(x)) * scaling


@torch.no_grad()
def _lengths(base_layer: TensorParallel_Layer, factor_A: Tensor, factor_B: Tensor, scaling: float) -> Tensor:
    """Return ‖W + s·B·A‖ of the rows that this rank has, whole or a part of each."""
    changed = torch.addmm(base_layer.weight, factor_B, factor_A, alpha=scaling)
    exact = torch.promote_types(changed.dtype, torch.float32)
    length = torch.linalg.vector_norm(changed, dim=1, dtype=exact)
    if isinstance(base_layer, LinearAllreduce):
        squares = length.square()
        dist.all_reduce(squares, group=base_layer.mp_group)
        length = squares.sqrt()
    return length


def _own(base_layer: LinearLayer | SubParamLinearLayer, values: Tensor) -> Tensor:
    """Return those of the rows that this rank has of a column-parallel weight, of values for all."""
    if isinstance(base_layer, LinearLayer):
        return values.split(base_layer._partition_sizes)[base_layer.tp_index]
    parts = values.split(base_layer._subparam_sizes)
    widths = base_layer._subparam_shard_widths
    return torch.cat([part.split(width)[base_layer.tp_index] for part, width in zip(parts, widths, strict=True)])


def _gathered(base_layer: LinearLayer, values: Tensor) -> Tensor:
    return base_layer._all_gather_shards(values, base_layer._partition_sizes, dim=0)
