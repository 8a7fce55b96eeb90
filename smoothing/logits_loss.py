"""Label-smoothed cross entropy from logits whose vocabulary is sharded over ranks.

Legend: T tokens, S columns of this rank (padding included), K real ones, n rows of a chunk.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smoothing import agreement
from smoothing.call import LossCall, TokenStats, argument_fault, dtype_fault, not_tensors, refused_call, refused_input
from smoothing.options import LossOptions
from smoothing.shard import VocabShard
from smoothing.shard_statistics import ShardStatistics, token_loss

# Logits are looked at in chunks of rows, in fp32. On the CPU a chunk stays in cache; on a device it only has to
# be small beside the logits and large beside a launch.
CHUNK_ELEMENTS = 1 << 18
DEVICE_CHUNK_ELEMENTS = 1 << 26


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    shard: VocabShard | None = None,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
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
    if fault := not_tensors(logits=logits):
        refused_input(target, shard).refuse_at_exchange(fault)
    leading, width = logits.shape[:-1], logits.shape[-1]
    shard = VocabShard.whole(width) if shard is None else shard
    fault = dtype_fault(logits=logits) or argument_fault(
        target, shard, options, smoothing_prior, num_items_in_batch, leading, width
    )
    if fault:
        refused_call(leading.numel(), logits.device, shard).refuse_at_exchange(fault)
    statistics_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    flat_T = target.reshape(leading.numel(), width) if target.is_floating_point() else target.reshape(-1)
    call = LossCall(
        target=flat_T,
        shard=shard,
        options=options,
        prior=None if smoothing_prior is None else smoothing_prior[: shard.real_size].to(statistics_dtype),
        statistics_dtype=statistics_dtype,
        input_dtype=logits.dtype,
        batch=agreement.batch_checksum(flat_T, num_items_in_batch),
    )
    logits_TS = logits.reshape(leading.numel(), width)
    with torch.autocast(logits.device.type, enabled=False):
        loss_T, *stats = _LogitsLoss.apply(logits_TS, call, inplace_backward, return_stats)
    loss = call.reduce(loss_T, leading, num_items_in_batch)
    return (loss, TokenStats(*(x.view(leading) if x is not None else None for x in stats))) if return_stats else loss


def smoothed_cross_entropy(logits: Tensor, target: Tensor, **options) -> Tensor | tuple[Tensor, TokenStats]:
    """`vocab_parallel_cross_entropy` of full logits `[..., V]` on one device, same options. No collectives."""
    return vocab_parallel_cross_entropy(logits, target, None, **options)


class _LogitsLoss(torch.autograd.Function):
    """`logits_TS` → `loss_T` (and statistics). Saves the logits themselves and three numbers a token."""

    @staticmethod
    def forward(ctx, logits_TS: Tensor, call: LossCall, inplace_backward: bool, return_stats: bool):
        rows = call.labelled_rows()
        combined = call.combine_all(_shard_statistics(logits_TS, call, rows))
        loss_T = token_loss(combined, call.options.label_smoothing, call.options.z_loss)
        loss_T = loss_T.masked_fill(~call.valid_T, 0.0)
        saved = (logits_TS, combined.maximum, combined.log_sum_exp, combined.label_mass)
        ctx.save_for_backward(*saved, call.target, call.prior)  # the call's only so that changing them is noticed
        ctx.call, ctx.rows, ctx.inplace_backward = call, rows, inplace_backward
        if not return_stats:
            return (loss_T,)
        stats = call.token_stats(combined, loss_T.shape)
        ctx.mark_non_differentiable(*(x for x in stats if x is not None))
        return loss_T, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_T: Tensor, *_):
        logits_TS, maximum_T, log_sum_exp_T, label_mass_T, *_ = ctx.saved_tensors
        call, rows = ctx.call, ctx.rows
        options, real_size = call.options, call.shard.real_size
        epsilon = options.label_smoothing
        # d loss / d lse of each token: Σq, and the z-loss's share
        lse_grad_T = (1 - epsilon) * label_mass_T + epsilon
        if options.z_loss > 0:
            lse_grad_T = lse_grad_T + 2 * options.z_loss * (maximum_T + log_sum_exp_T)
        grad_logits_TS = logits_TS if ctx.inplace_backward else torch.empty_like(logits_TS)
        for chunk in _row_chunks(rows, call.tokens, logits_TS.shape[-1], logits_TS.device):
            z_nK, capped_nK = _chunk_logits(logits_TS, chunk, call)
            softmax_nK = z_nK.sub_(maximum_T[chunk, None]).sub_(log_sum_exp_T[chunk, None]).exp_()
            grad_nK = softmax_nK.mul_(lse_grad_T[chunk, None])
            _subtract_labels(grad_nK, call, chunk)
            grad_nK.mul_(grad_T[chunk, None])
            if capped_nK is not None:
                grad_nK.mul_(1 - (capped_nK / options.logit_softcap).square_())
            if rows is None and not call.soft:
                grad_nK.masked_fill_((call.target[chunk] == options.ignore_index).unsqueeze(1), 0.0)
            grad_logits_TS[chunk, :real_size] = grad_nK.to(logits_TS.dtype)
        if rows is not None:
            grad_logits_TS[~call.valid_T] = 0
        grad_logits_TS[:, real_size:] = 0
        return grad_logits_TS.detach(), None, None, None


def _shard_statistics(logits_TS: Tensor, call: LossCall, rows: Tensor | None) -> ShardStatistics:
    """This rank's statistics, `[T]` each. Tokens without a label are not looked at where `rows` leaves them out."""
    soft, dtype, device = call.soft, call.statistics_dtype, logits_TS.device
    if call.shard.real_size == 0:
        return ShardStatistics.nothing(call.tokens, soft, dtype=dtype, device=device)
    # ones and zeros: the statistics of a token that is left out stay finite all the way
    maximum_T, label_T, prior_T = (torch.zeros(call.tokens, dtype=dtype, device=device) for _ in range(3))
    sum_exp_T = torch.ones_like(maximum_T)
    label_mass_T = torch.zeros_like(maximum_T) if soft else None
    for chunk in _row_chunks(rows, call.tokens, logits_TS.shape[-1], device):
        z_nK, _ = _chunk_logits(logits_TS, chunk, call)
        max_n = z_nK.amax(1)
        maximum_T[chunk] = max_n
        # with all logits -inf there is no maximum to be relative to, and nothing that needs one
        z_nK.sub_(torch.where(max_n == -torch.inf, 0.0, max_n).unsqueeze(1))
        if soft:
            p_nK = call.target[chunk, : call.shard.real_size].to(dtype)
            label_T[chunk] = _weighted_sum(p_nK, z_nK)
            label_mass_T[chunk] = p_nK.sum(1)
        else:
            owned_n, column_n = call.local_target(chunk)
            label_T[chunk] = torch.where(owned_n, z_nK.gather(1, column_n.unsqueeze(1)).squeeze(1), 0.0)
        if call.options.label_smoothing > 0:
            uniform = call.prior is None
            prior_T[chunk] = z_nK.sum(1) / call.shard.vocab_size if uniform else _weighted_sum(call.prior, z_nK)
        sum_exp_T[chunk] = z_nK.exp_().sum(1)
    return ShardStatistics(maximum_T, sum_exp_T, label_T, prior_T, label_mass_T)


def _chunk_logits(logits_TS: Tensor, chunk, call: LossCall) -> tuple[Tensor, Tensor | None]:
    """A working copy of these rows' real logits in the statistics' dtype, and the capped logits with a softcap."""
    z_nS = logits_TS[chunk]
    z_nK = z_nS[:, : call.shard.real_size].to(call.statistics_dtype, copy=True)
    if (cap := call.options.logit_softcap) is None:
        return z_nK, None
    z_nK.div_(cap).tanh_().mul_(cap)
    return z_nK, z_nK.clone()


def _subtract_labels(grad_nK: Tensor, call: LossCall, chunk) -> None:
    """`grad -= q`, the smoothed labels `(1-ε)·p + ε·u`, in place."""
    epsilon = call.options.label_smoothing
    if epsilon > 0:
        grad_nK.sub_(epsilon / call.shard.vocab_size if call.prior is None else epsilon * call.prior)
    if call.soft:
        grad_nK.sub_(call.target[chunk, : call.shard.real_size].to(grad_nK.dtype), alpha=1 - epsilon)
    elif grad_nK.shape[1] > 0:
        owned_n, column_n = call.local_target(chunk)
        share_n1 = owned_n.unsqueeze(1).to(grad_nK.dtype) * (1 - epsilon)
        grad_nK.scatter_add_(1, column_n.unsqueeze(1), -share_n1)


def _weighted_sum(weight: Tensor, z_nK: Tensor) -> Tensor:
    # 0·(-inf) is a column that the weight leaves out, not a NaN
    return torch.where(weight > 0, weight * z_nK, 0.0).sum(1)


def _row_chunks(rows: Tensor | None, tokens: int, columns: int, device: torch.device):
    """Index chunks over `rows` (or slices over all tokens) of about the chunk size in elements."""
    elements = CHUNK_ELEMENTS if device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    step = max(1, elements // max(1, columns))
    if rows is None:
        return (slice(start, min(start + step, tokens)) for start in range(0, tokens, step))
    return iter(rows.split(step)) if len(rows) else iter(())
