"""Label-smoothed cross entropy from logits whose vocabulary is sharded over ranks.

Legend: T tokens, S columns of this rank (padding included).
"""

from typing import Any

import torch
from torch import Tensor

from smoothing.core.arguments import argument_problem, dtype_problem, tensor_problem
from smoothing.core.call import LossCall, TokenStats
from smoothing.core.dtensor import local_logits
from smoothing.core.once import once_differentiable, transform_problem
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
    logit_scale: float = 1.0,
    return_stats: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Compute the label-smoothed cross entropy of sharded logits; the same loss, to the bit, on every rank.

        loss = lse(z) - (1-ε)·z_y - ε·Σ_v u_v z_v + z_loss·lse(z)²,     u_v = 1/vocab_size unless given

    Args:
        logits: `[..., S]` fp32, bf16, fp16 or fp64: this rank's columns, padding included. Or a DTensor `[..., V]`,
            split along its last dimension: `shard` then follows from it.
        target: labels, `[...]` int64 global ids, or probabilities `[..., S]` floating point (this rank's columns).
        shard: which columns this rank holds, and whose group holds the rest; None for a whole vocabulary on one rank.
        label_smoothing: ε, in [0, 1].
        ignore_index: label of tokens that have none; they take part in nothing.
        reduction: "mean" divides by the number of labelled tokens, or by `num_items_in_batch`; "sum"; "none" gives
            one loss a token. Without any labelled token the loss is 0.0, connected to the graph.
        num_items_in_batch: what "mean" divides by instead, one number; a tensor is not read on the host.
        smoothing_prior: `[S]` floating point, this rank's slice of a distribution over the vocabulary; None: uniform.
        z_loss: weight of `lse(z)²`, at least 0.
        logit_softcap: `cap` of `cap·tanh(z / cap)`, applied to the logits first; None: none.
        logit_scale: what the logits are multiplied by before all else, above 0.
        return_stats: also return per-token statistics.
        inplace_backward: let the gradient take the logits' memory; otherwise they stay as they were.

    Returns:
        The loss, `[]` or `[...]`, fp32 (fp64 for fp64 logits); with `return_stats`, `(loss, TokenStats)`.

    Raises:
        ValueError: on every rank, if any rank's arguments are wrong or the ranks' differ (targets on a device: a
            device-side assertion); under a transform of `torch.func`.
        RuntimeError: where the gradient is differentiated again (`create_graph=True`), which has no graph.

    Collectives:
        Forward: one all-gather of 16 bytes a token (20 with probabilities; twice that in fp64) and 72 a call from
        each rank, and once for each `VocabShard` one of 72 bytes. Backward: none.

    Source:
        Szegedy et al. 2016, §7, as `torch.nn.functional.cross_entropy(label_smoothing=)` has it.
    """
    options = LossOptions(label_smoothing, ignore_index, reduction, z_loss, logit_softcap, logit_scale)
    try:
        logits, target, smoothing_prior, shard = local_logits(logits, target, smoothing_prior, shard)
        call = _checked(logits, target, shard, options, smoothing_prior, num_items_in_batch, return_stats)
    except Exception as error:  # whatever it is, the other ranks must learn of it
        refuse_at_exchange(error, shard, logits, target)
    leading = logits.shape[:-1]
    if options.logit_scale != 1:
        logits = logits * options.logit_scale
    logits_TS = logits.reshape(leading.numel(), logits.shape[-1])
    with torch.autocast(logits.device.type, enabled=False):
        loss, *stats = _LogitsLoss.apply(logits_TS, call, num_items_in_batch, inplace_backward)  # type: ignore[no-untyped-call]  # torch has no types for it
    value: Tensor = loss.view(leading) if reduction == "none" else loss
    if not return_stats:
        return value
    shaped: list[Any] = [None if x is None else x.view(leading) for x in stats]
    return value, TokenStats(*shaped)


def _checked(
    logits: Any,
    target: Any,
    shard: Any,
    options: LossOptions,
    prior: Any,
    num_items_in_batch: Any,
    return_stats: Any,
) -> LossCall:
    """This call, its arguments looked at. Raises `ValueError` for one that is wrong."""
    if problem := transform_problem() or tensor_problem(logits=logits) or dtype_problem(logits=logits):
        raise ValueError(problem)
    rows, width = logits.shape[:-1].numel(), logits.shape[-1]
    shard = VocabShard.whole(width) if shard is None else shard
    if problem := argument_problem(logits, target, shard, options, prior, num_items_in_batch, width):
        raise ValueError(problem)
    flat_T = target.reshape(rows, width) if target.is_floating_point() else target.reshape(-1)
    return LossCall.of(flat_T, shard, options, prior, logits.dtype, num_items_in_batch, with_stats=bool(return_stats))


def smoothed_cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor | tuple[Tensor, TokenStats]:
    """Compute the loss of `vocab_parallel_cross_entropy` from full logits on one device.

    Args:
        logits: `[..., V]` fp32, bf16, fp16 or fp64.
        target: labels, `[...]` int64, or probabilities `[..., V]` floating point.
        **options: keyword arguments of `vocab_parallel_cross_entropy`.

    Returns:
        The loss; with `return_stats=True`, `(loss, TokenStats)`.

    Raises:
        ValueError: if an argument is wrong.

    Collectives:
        None.
    """
    return vocab_parallel_cross_entropy(logits, target, None, **options)


class _LogitsLoss(torch.autograd.Function):
    """`logits_TS` → loss (and statistics). Saves the logits themselves and two numbers a token."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TS: Tensor,
        call: LossCall,
        num_items_in_batch: int | Tensor | None,
        inplace_backward: bool,
    ) -> tuple[Tensor | None, ...]:
        backend = backend_for(logits_TS.device, call)
        own_FT = backend.statistics(logits_TS, call.target, call)
        combined, scale_T, losses = backend.combine(*call.gather(own_FT, backend.checks_labels), call.target, call)
        assert losses is not None, "known with Σ u_v z_v"
        ctx.call, ctx.inplace_backward, ctx.backend = call, inplace_backward, backend
        loss, ctx.divisor = backend.reduce(losses, call, num_items_in_batch)
        # target and prior are saved only so that changing them is noticed
        ctx.save_for_backward(logits_TS, combined.maximum, scale_T, call.target, call.prior)
        if not call.with_stats:
            return (loss,)
        stats = call.token_stats(combined, losses.loss_T.shape)
        ctx.mark_non_differentiable(*(x for x in stats if x is not None))
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        logits_TS, maximum_T, scale_T, *_ = ctx.saved_tensors
        call = ctx.call
        out_TS = logits_TS.detach() if ctx.inplace_backward else torch.empty_like(logits_TS)
        numbers = (maximum_T, scale_T, upstream)
        gradient = ctx.backend.gradient(logits_TS, call.target, call, *numbers, out_TS, divisor=ctx.divisor)
        return gradient, None, None, None
