"""Softmax statistics of one chunk of logits that nobody else needs: they are used up in place.

Legend: n rows of the chunk, K real columns of this rank.
"""

import torch
from torch import Tensor

from smoothing.call import LossCall
from smoothing.shard_statistics import ShardStatistics

# Four passes over a few rows at a time, so that on the CPU three of them find the rows in cache.
CACHE_ELEMENTS = 1 << 18


def consume(z_nK: Tensor, call: LossCall, tokens: slice, with_prior: bool) -> ShardStatistics:
    """Statistics of these tokens' logits, and `z` becomes `exp(z - m_r)` in place.

    `with_prior`: take Σ u_v z_v from the logits too (a softcap makes the head non-linear; otherwise it is known).
    """
    count, real_size = z_nK.shape
    options = {"dtype": z_nK.dtype, "device": z_nK.device}
    if real_size == 0:
        return ShardStatistics.nothing(count, call.soft, with_prior, **options)
    maximum_n, sum_exp_n = (torch.empty(count, **options) for _ in range(2))
    label_n = prior_n = label_mass_n = None
    p_nK = call.target[tokens, :real_size].to(z_nK.dtype) if call.soft else None
    if call.soft:
        label_n, label_mass_n = torch.empty(count, **options), p_nK.sum(1)
    else:
        owned_n, column_n = call.local_target(tokens)
        at_label_n = z_nK.gather(1, column_n.unsqueeze(1)).squeeze(1)
    if with_prior:
        prior_n = torch.zeros(count, **options)
    step = count if z_nK.device.type != "cpu" else max(1, CACHE_ELEMENTS // real_size)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        z_bK = z_nK[rows]
        torch.amax(z_bK, 1, out=maximum_n[rows])
        z_bK.sub_(finite_or_zero(maximum_n[rows]).unsqueeze(1))
        if call.soft:
            label_n[rows] = weighted_sum(p_nK[rows], z_bK)
        if with_prior and call.options.label_smoothing > 0:
            uniform = call.prior is None
            prior_n[rows] = z_bK.sum(1) / call.shard.vocab_size if uniform else weighted_sum(call.prior, z_bK)
        torch.sum(z_bK.exp_(), 1, out=sum_exp_n[rows])
    if not call.soft:
        label_n = torch.where(owned_n, at_label_n - finite_or_zero(maximum_n), 0.0)
    return ShardStatistics(maximum_n, sum_exp_n, label_n, prior_n, label_mass_n)


def finite_or_zero(maximum_n: Tensor) -> Tensor:
    """What logits are taken relative to: where all are -inf there is no maximum, and nothing that needs one."""
    return torch.where(maximum_n == -torch.inf, 0.0, maximum_n)


def weighted_sum(weight: Tensor, z_nK: Tensor) -> Tensor:
    """`Σ_v w_v z_v`, where 0·(-inf) is a column that the weight leaves out, not a NaN."""
    return torch.where(weight > 0, weight * z_nK, 0.0).sum(1)
