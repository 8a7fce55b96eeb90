"""Label-smoothed cross entropy from logits whose vocabulary is sharded over ranks.

Legend: T tokens, S columns of this rank (padding included).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smoothing.core import agreement
from smoothing.core.arguments import argument_problem, dtype_problem, tensor_problem
from smoothing.core.call import LossCall, TokenStats
from smoothing.core.options import DEFAULT_IGNORE_INDEX, LossOptions
from smoothing.core.refusal import refuse_at_exchange
from smoothing.kernels.dispatch import backend_for
from smoothing.shard import VocabShard


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    shard: VocabShard | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    smoothing_prior: Tensor | None = None,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    return_stats: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Label-smoothed cross entropy of this rank's logits `[..., S]`; the same loss, to the bit, on every rank.

        loss = lse(z) - (1-ε)·z_y - ε·Σ_v u_v z_v + z_loss·lse(z)²,     u_v = 1/vocab_size unless given

    `target`: int64 global ids `[...]`, or probabilities `[..., S]` (this rank's columns). `smoothing_prior`: `[S]`,
    this rank's slice of a distribution over the vocabulary. `reduction="mean"` divides by the number of targets
    that are not `ignore_index`, or by `num_items_in_batch`; without any such target the loss is 0.0, connected to
    the graph. `inplace_backward=True` lets the gradient take the logits' memory; otherwise they stay as they were.
    Logits: fp32, bf16, fp16 (the loss is fp32) or fp64 (the loss is fp64), any leading shape.

    Returns the loss, or `(loss, TokenStats)` with `return_stats`. Raises `ValueError` on every rank if any rank's
    arguments are wrong or the ranks' differ (targets on a device: a device-side assertion).
    Collectives: forward one all-gather of 16 bytes a token (20 with probabilities) and 72 a call from each rank,
    and once for each `VocabShard` one of 72 bytes; backward none.
    Source: Szegedy et al. 2016, §7, as `torch.nn.functional.cross_entropy(label_smoothing=)` has it.
    """
    options = LossOptions(label_smoothing, ignore_index, reduction, z_loss, logit_softcap)
    try:
        call = _checked(logits, target, shard, options, smoothing_prior, num_items_in_batch)
    except Exception as error:  # whatever it is, the other ranks must learn of it
        refuse_at_exchange(error, shard, logits, target)
    leading = logits.shape[:-1]
    logits_TS = logits.reshape(leading.numel(), logits.shape[-1])
    with torch.autocast(logits.device.type, enabled=False):
        loss, *stats = _LogitsLoss.apply(logits_TS, call, num_items_in_batch, inplace_backward, return_stats)
    loss = loss.view(leading) if reduction == "none" else loss
    return (loss, TokenStats(*(x.view(leading) if x is not None else None for x in stats))) if return_stats else loss


def _checked(logits, target, shard, options: LossOptions, prior, num_items_in_batch) -> LossCall:
    """This call, its arguments looked at. Raises `ValueError` for one that is wrong."""
    if problem := tensor_problem(logits=logits) or dtype_problem(logits=logits):
        raise ValueError(problem)
    rows, width = logits.shape[:-1].numel(), logits.shape[-1]
    shard = VocabShard.whole(width) if shard is None else shard
    if problem := argument_problem(logits, target, shard, options, prior, num_items_in_batch, width):
        raise ValueError(problem)
    statistics_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    flat_T = target.reshape(rows, width) if target.is_floating_point() else target.reshape(-1)
    return LossCall(
        target=flat_T,
        shard=shard,
        options=options,
        prior=None if prior is None else prior[: shard.real_size].to(statistics_dtype),
        statistics_dtype=statistics_dtype,
        input_dtype=logits.dtype,
        batch_checksum=agreement.batch_checksum(flat_T, num_items_in_batch) if shard.world_size > 1 else None,
    )


def smoothed_cross_entropy(logits: Tensor, target: Tensor, **options) -> Tensor | tuple[Tensor, TokenStats]:
    """`vocab_parallel_cross_entropy` of full logits `[..., V]` on one device, same options. No collectives."""
    return vocab_parallel_cross_entropy(logits, target, None, **options)


class _LogitsLoss(torch.autograd.Function):
    """`logits_TS` → loss (and statistics). Saves the logits themselves and two numbers a token."""

    @staticmethod
    def forward(
        ctx, logits_TS: Tensor, call: LossCall, num_items_in_batch, inplace_backward: bool, return_stats: bool
    ):
        backend = backend_for(logits_TS.device, call)
        own = backend.statistics(logits_TS, call.target, call)
        combined, scale_T, loss_T = backend.combine(*call.gather(own), call.target, call)
        ctx.call, ctx.inplace_backward = call, inplace_backward
        ctx.divisor = None if call.options.reduction == "none" else call.divisor(num_items_in_batch)
        loss = loss_T if ctx.divisor is None else loss_T.sum() / ctx.divisor
        # target and prior are saved only so that changing them is noticed
        ctx.save_for_backward(logits_TS, combined.maximum, scale_T, call.target, call.prior)
        if not return_stats:
            return (loss,)
        stats = call.token_stats(combined, loss_T.shape)
        ctx.mark_non_differentiable(*(x for x in stats if x is not None))
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, *_):
        logits_TS, maximum_T, scale_T, *_ = ctx.saved_tensors
        call = ctx.call
        weight_T = upstream if ctx.divisor is None else (upstream / ctx.divisor).expand(call.tokens)
        out_TS = logits_TS.detach() if ctx.inplace_backward else torch.empty_like(logits_TS)
        compute = backend_for(logits_TS.device, call).gradient
        gradient = compute(logits_TS, call.target, call, maximum_T, scale_T, weight_T, out_TS)
        return gradient, None, None, None, None
