"""The two passes over a shard's logits, and what is between them, as torch operations on a few rows at a time.

Legend: T tokens, S columns of this rank (padding included), K real ones, n rows of a chunk.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from smoothing.core import agreement
from smoothing.core.call import LossCall
from smoothing.core.statistics import Combined, Losses, ShardStatistics, add_up, token_loss

# Rows are looked at in chunks, in the statistics' dtype. On the CPU a chunk stays in cache; on a device it only has
# to be small beside the logits and large beside a launch.
CHUNK_ELEMENTS = 1 << 18
DEVICE_CHUNK_ELEMENTS = 1 << 26


checks_labels = False


def statistics(logits_TS: Tensor, target: Tensor, call: LossCall, with_prior: bool = True) -> Tensor:
    """This rank's statistics, `[F, T]`, of logits with these targets. Tokens without a label are not looked at.

    `with_prior=False`: Σ u_v z_v is not taken.
    """
    count, device, dtype = len(target), logits_TS.device, call.statistics_dtype
    if call.shard.real_size == 0:
        return ShardStatistics.nothing(count, call.soft, with_prior, dtype=dtype, device=device).stack()
    # ones and zeros: the statistics of a token that is left out stay finite all the way
    maximum_T, label_T = (torch.zeros(count, dtype=dtype, device=device) for _ in range(2))
    sum_exp_T = torch.ones_like(maximum_T)
    prior_T = torch.zeros_like(maximum_T) if with_prior else None
    label_mass_T = torch.zeros_like(maximum_T) if call.soft else None
    for chunk in _row_chunks(logits_TS, target, call):
        z_nK = _capped(logits_TS, chunk, call)
        max_n = z_nK.amax(1)
        maximum_T[chunk] = max_n
        z_nK.sub_(finite_or_zero(max_n).unsqueeze(1))
        if label_mass_T is not None:
            p_nK = target[chunk, : call.shard.real_size].to(dtype)
            label_T[chunk] = weighted_sum(p_nK, z_nK)
            label_mass_T[chunk] = p_nK.sum(1)
        else:
            owned_n, column_n = call.local_target(target[chunk])
            label_n = torch.where(owned_n, z_nK.gather(1, column_n.unsqueeze(1)).squeeze(1), 0.0)
            label_T[chunk] = signed_zeros(z_nK, label_n, owned_n, column_n) if call.with_stats else label_n
        if prior_T is not None and call.options.label_smoothing > 0:
            prior_T[chunk] = (
                z_nK.sum(1) / call.shard.vocab_size if call.prior is None else weighted_sum(call.prior, z_nK)
            )
        sum_exp_T[chunk] = z_nK.exp_().sum(1)
    return ShardStatistics(maximum_T, sum_exp_T, label_T, prior_T, label_mass_T).stack()


def statistics_in_place(z_nK: Tensor, target_n: Tensor, call: LossCall) -> Tensor:
    """Statistics without Σ u_v z_v, of logits that are not needed any more: `z` becomes `exp(z - m_r)`.

    Three passes over a few rows at a time, so that on the CPU two of them find the rows in cache.
    """
    count, real_size = z_nK.shape
    dtype, device = z_nK.dtype, z_nK.device
    if real_size == 0:
        return ShardStatistics.nothing(count, soft=False, prior=False, dtype=dtype, device=device).stack()
    maximum_n, sum_exp_n = (torch.empty(count, dtype=dtype, device=device) for _ in range(2))
    owned_n, column_n = call.local_target(target_n)
    label_n = z_nK.gather(1, column_n.unsqueeze(1)).squeeze(1)
    step = max(1, CHUNK_ELEMENTS // real_size)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        z_bK = z_nK[rows]
        torch.amax(z_bK, 1, out=maximum_n[rows])
        base_b = finite_or_zero(maximum_n[rows])
        z_bK.sub_(base_b.unsqueeze(1))
        label_b = torch.where(owned_n[rows], label_n[rows] - base_b, 0.0)
        label_n[rows] = signed_zeros(z_bK, label_b, owned_n[rows], column_n[rows]) if call.with_stats else label_b
        torch.sum(z_bK.exp_(), 1, out=sum_exp_n[rows])
    return ShardStatistics(maximum_n, sum_exp_n, label_n, None).stack()


def combine(
    stats_RFT: Tensor, headers_RH: Tensor | None, target: Tensor, call: LossCall, with_prior: bool = True
) -> tuple[Combined, Tensor, Losses | None]:
    """All ranks' statistics added up, `call.softmax_scale` of them, and the losses, 0 where there is no label.

    `headers_RH`: the ranks' headers, None for one rank. `with_prior=False`: the statistics have no Σ u_v z_v, and no
    loss is known yet.
    """
    owner_T = None if call.soft else _owner(target, headers_RH, call.shard.vocab_size)
    mass_R = stats_RFT.new_ones(1) if headers_RH is None else agreement.prior_masses(headers_RH)
    combined = add_up(stats_RFT, owner_T, mass_R if with_prior else None)
    losses = None
    if with_prior:
        loss_T = token_loss(combined, call.options.label_smoothing, call.options.z_loss)
        if not call.soft:
            loss_T = loss_T.masked_fill(target == call.options.ignore_index, 0.0)
        losses = Losses(loss_T)
    return combined, call.softmax_scale(combined), losses


def reduce(losses: Losses, call: LossCall, items: int | Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The loss as the call's reduction has it, and what a sum was divided by, `[]`; None for "none"."""
    if call.options.reduction == "none":
        return losses.loss_T, None
    divisor = call.divisor(items)
    return losses.loss_T.sum() / divisor, divisor


def gradient(
    logits_TS: Tensor,
    target: Tensor,
    call: LossCall,
    base_T: Tensor,
    scale_T: Tensor,
    weight_T: Tensor,
    out_TS: Tensor,
    with_prior: bool = True,
    divisor: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits into `out_TS`, which may be their memory, row by row, in a narrower dtype too.

        ∂z_v = weight·(scale·exp(z_v - base) - (1-ε)·q_v - ε·u_v)·(1 - (z_v/cap)²)

    `base` and `scale` `[T]` make a probability (times its factor from a z-loss) of a logit, `weight` `[T]` is what
    the loss is scaled by, `q` the labels. Columns past the real ones and rows without a label become 0.
    `with_prior=False` leaves ε·u out.
    """
    cap, real_size = call.options.logit_softcap, call.shard.real_size
    weight_T = weight_T if divisor is None else weight_T / divisor
    weight_T = weight_T if weight_T.dim() else weight_T.expand(call.tokens)
    unlabelled_T = None if call.soft else target == call.options.ignore_index
    rows = _labelled_rows(target, call)
    for chunk in _row_chunks(logits_TS, target, call):
        z_nK = _capped(logits_TS, chunk, call)
        slope_nK = None if cap is None else 1 - (z_nK / cap).square_()
        grad_nK = z_nK.sub_(base_T[chunk, None]).exp_().mul_(scale_T[chunk, None])
        _subtract_labels(grad_nK, target[chunk], call, with_prior)
        grad_nK.mul_(weight_T[chunk, None])
        if slope_nK is not None:
            grad_nK.mul_(slope_nK)
        if rows is None and unlabelled_T is not None:
            grad_nK.masked_fill_(unlabelled_T[chunk].unsqueeze(1), 0.0)
        out_TS[chunk, :real_size] = grad_nK.to(out_TS.dtype)
    if rows is not None:
        out_TS[unlabelled_T] = 0
    out_TS[:, real_size:] = 0
    return out_TS


def scale(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply gradients by one number; on the CPU nothing is done where that is 1."""
    if factor.device.type != "cpu" or factor != 1:
        for gradient in gradients:
            gradient.mul_(factor)


def finite_or_zero(maximum_n: Tensor) -> Tensor:
    """What logits are taken relative to: where all are -inf there is no maximum, and nothing that needs one."""
    return torch.where(maximum_n == -torch.inf, 0.0, maximum_n)


def signed_zeros(z_nK: Tensor, label_n: Tensor, owned_n: Tensor, column_n: Tensor) -> Tensor:
    """`label_n`, -0.0 where it is 0 and an earlier column of the logits, relative to their maximum, is 0 too."""
    top_n, column_n1 = owned_n & (label_n == 0), column_n.unsqueeze(1)
    if z_nK.device.type != "cpu":
        return torch.where(top_n & (z_nK.argmax(1) != column_n), -0.0, label_n)
    # `amax` is ten times as fast as `argmax` there, and hardly any token needs the latter
    at_column_n1 = z_nK.gather(1, column_n1)
    tied_n = top_n & (z_nK.scatter_(1, column_n1, -torch.inf).amax(1) == 0)
    z_nK.scatter_(1, column_n1, at_column_n1)
    if not tied_n.any():
        return label_n
    rows = tied_n.nonzero().squeeze(1)
    later = rows[z_nK[rows].argmax(1) != column_n[rows]]
    return label_n.index_fill(0, later, -0.0)


def weighted_sum(weight: Tensor, z_nK: Tensor) -> Tensor:
    """`Σ_v w_v z_v`, where 0·(-inf) is a column that the weight leaves out, not a NaN."""
    return torch.where(weight != 0, weight * z_nK, 0.0).sum(1)


def _owner(label_n: Tensor, headers_RH: Tensor | None, vocab_size: int) -> Tensor:
    """The rank that holds each label."""
    if headers_RH is None:
        return torch.zeros_like(label_n)
    starts_R = agreement.starts(headers_RH)
    return torch.bucketize(label_n.clamp(0, vocab_size - 1), starts_R, right=True) - 1


def _capped(logits_TS: Tensor, chunk: slice | Tensor, call: LossCall) -> Tensor:
    """A working copy of these rows' real logits in the statistics' dtype, capped if the call has a softcap."""
    z_nK = logits_TS[chunk][:, : call.shard.real_size].to(call.statistics_dtype, copy=True)
    if (cap := call.options.logit_softcap) is None:
        return z_nK
    return z_nK.div_(cap).tanh_().mul_(cap)


def _subtract_labels(grad_nK: Tensor, target_n: Tensor, call: LossCall, with_prior: bool) -> None:
    """`grad -= q`, the smoothed labels `(1-ε)·p + ε·u` (or only the first), in place."""
    epsilon = call.options.label_smoothing
    if with_prior and epsilon > 0:
        grad_nK.sub_(epsilon / call.shard.vocab_size if call.prior is None else epsilon * call.prior)
    if call.soft:
        grad_nK.sub_(target_n[:, : call.shard.real_size].to(grad_nK.dtype), alpha=1 - epsilon)
    elif grad_nK.shape[1] > 0:
        owned_n, column_n = call.local_target(target_n)
        share_n1 = owned_n.unsqueeze(1).to(grad_nK.dtype) * (1 - epsilon)
        grad_nK.scatter_add_(1, column_n.unsqueeze(1), -share_n1)


def _labelled_rows(target: Tensor, call: LossCall) -> Tensor | None:
    """Indices of the tokens that have a label; None for "look at all", which needs no synchronisation."""
    if call.soft or target.device.type != "cpu":
        return None
    valid_T = target != call.options.ignore_index
    return None if bool(valid_T.all()) else valid_T.nonzero().squeeze(1)


def _row_chunks(logits_TS: Tensor, target: Tensor, call: LossCall) -> Iterator[slice | Tensor]:
    """Index chunks over the rows with a label (or slices over all) of about the chunk size in elements."""
    elements = CHUNK_ELEMENTS if logits_TS.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    step = max(1, elements // max(1, logits_TS.shape[1]))
    rows = _labelled_rows(target, call)
    if rows is None:
        return (slice(start, start + step) for start in range(0, len(target), step))
    return iter(rows.split(step)) if len(rows) else iter(())  # type: ignore[no-untyped-call]  # torch has no types for it
