"""Full logits from sharded ones: the baseline that the other heads avoid, and what `generate` needs."""

from typing import Any

import torch
from torch import Tensor

from smoothing.core.collectives import all_gather
from smoothing.core.once import anchor, once_differentiable
from smoothing.shard import VocabShard


def gather_logits(logits: Tensor, shard: VocabShard) -> Tensor:
    """This rank's logits `[..., S]` to all ranks' `[..., vocab_size]`, padding removed.

    Backward hands each rank its own columns of the gradient: every rank computes the same loss from the same
    logits, so there is nothing to add up. Collectives: forward two all-gathers (widths, logits); backward none.
    """
    if shard.world_size == 1:
        return logits[..., : shard.real_size]
    gathered: Tensor = _GatherLogits.apply(logits, anchor(logits), shard)  # type: ignore[no-untyped-call]  # torch has no types for it
    return gathered


class _GatherLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, anchored: Tensor | None, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        ctx.save_for_backward(anchored)
        # shards differ in width by at most one column in the even split, and by more if a user says so
        widths = all_gather(torch.tensor([shard.real_size], device=logits.device), shard).flatten().tolist()
        padded = logits.new_zeros(*logits.shape[:-1], max(widths))
        padded[..., : shard.real_size] = logits[..., : shard.real_size]
        parts = all_gather(padded, shard).view(-1, *padded.shape)
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        shard = ctx.shard
        own = grad.new_zeros(*grad.shape[:-1], shard.size)
        own[..., : shard.real_size] = grad[..., shard.start : shard.start + shard.real_size]
        return own, None, None
