"""Softmax statistics of one chunk of logits that nobody else needs: they are used up in place.

Legend: n rows of the chunk, K real columns of this rank.
"""

import torch
from torch import Tensor

from smoothing.core.call import LossCall
from smoothing.core.statistics import ShardStatistics
from smoothing.kernels.torch_ops import finite_or_zero

# Three passes over a few rows at a time, so that on the CPU two of them find the rows in cache.
CACHE_ELEMENTS = 1 << 18


def consume(z_nK: Tensor, target_n: Tensor, call: LossCall) -> ShardStatistics:
    """Statistics of logits with these labels, but for Σ u_v z_v; and `z` becomes `exp(z - m_r)` in place."""
    count, real_size = z_nK.shape
    options = {"dtype": z_nK.dtype, "device": z_nK.device}
    if real_size == 0:
        return ShardStatistics.nothing(count, soft=False, prior=False, **options)
    maximum_n, sum_exp_n = (torch.empty(count, **options) for _ in range(2))
    owned_n, column_n = call.local_target(target_n)
    at_label_n = z_nK.gather(1, column_n.unsqueeze(1)).squeeze(1)
    step = max(1, CACHE_ELEMENTS // real_size)
    for start in range(0, count, step):
        rows = slice(start, start + step)
        z_bK = z_nK[rows]
        torch.amax(z_bK, 1, out=maximum_n[rows])
        z_bK.sub_(finite_or_zero(maximum_n[rows]).unsqueeze(1)).exp_()
        torch.sum(z_bK, 1, out=sum_exp_n[rows])
    label_n = torch.where(owned_n, at_label_n - finite_or_zero(maximum_n), 0.0)
    return ShardStatistics(maximum_n, sum_exp_n, label_n, None)
