"""What each shard adds to the numbers of a token, and what all shards' sums make of them.

Legend: N tokens, n those of a chunk, K real columns of this rank, R ranks, G temperatures. Each rank describes each
token by sums over its own columns, relative to its own maximum `m_r`:

    s = Σ exp(z-m)     e = Σ (z-m)·exp(z-m)     q = Σ exp(2(z-m))     s_T = Σ exp((z-m)/T)

With M the maximum of all ranks they become s·exp(m-M), (e + (m-M)·s)·exp(m-M), q·exp(2(m-M)), s_T·exp((m-M)/T).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from smoothing.core.call import LossCall
from smoothing.core.statistics import is_first_at_maximum, label_below_maximum
from smoothing.kernels.torch_ops import finite_or_zero, signed_zeros

FIXED = 5  # numbers a token besides one for each temperature


class Figures(NamedTuple):
    """Of a distribution for each token, `[N]`, and `[N, G]` at the temperatures."""

    nll: Tensor
    confidence: Tensor
    correct: Tensor
    entropy: Tensor
    sum_square: Tensor
    nll_at: Tensor
    confidence_at: Tensor


class Base(NamedTuple):
    """What logits are taken relative to, for log-probabilities: `z - maximum - log_sum`, each `[N]`."""

    maximum: Tensor
    log_sum: Tensor

    def of(self, tokens: slice) -> "Base":
        return Base(self.maximum[tokens], self.log_sum[tokens])


def shard_sums(z_nK: Tensor, target_n: Tensor, call: LossCall, temperatures: tuple[float, ...]) -> Tensor:
    """Return this rank's sums, `[FIXED + G, n]`: m, s, e, q, z_y - m and s_T. Overwrites the logits.

    The zeros of z_y - m are signed, as `smoothing.core.statistics` says.
    """
    if z_nK.shape[1] == 0:
        nothing = z_nK.new_zeros(FIXED + len(temperatures), len(z_nK))
        nothing[0] = -torch.inf
        return nothing
    maximum_n = z_nK.amax(1)
    z_nK.sub_(finite_or_zero(maximum_n).unsqueeze(1))
    owned_n, column_n = call.local_target(target_n)
    label_n = torch.where(owned_n, z_nK.gather(1, column_n.unsqueeze(1)).squeeze(1), 0.0)
    label_n = signed_zeros(z_nK, label_n, owned_n, column_n)
    at = [(z_nK / temperature).exp_().sum(1) for temperature in temperatures]
    exp_nK = z_nK.exp()
    sum_square_n = exp_nK.square().sum(1)
    weighted_n = z_nK.mul_(exp_nK).nan_to_num_(nan=0.0).sum(1)  # -inf·0, of a column without probability
    return torch.stack([maximum_n, exp_nK.sum(1), weighted_n, sum_square_n, label_n, *at])


def combine(sums_RFN: Tensor, owner_N: Tensor, temperatures: tuple[float, ...]) -> tuple[Figures, Base]:
    """Return what all ranks' sums say of each token, alike everywhere, and what log-probabilities are relative to."""
    maximum_RN, sum_RN, weighted_RN, square_RN, label_RN = sums_RFN[:, :FIXED].unbind(1)
    maximum_N = maximum_RN.amax(0)
    shift_RN = maximum_RN - maximum_N
    scale_RN = shift_RN.exp()
    sum_N = (sum_RN * scale_RN).sum(0)
    shifted_RN = torch.where(sum_RN != 0, shift_RN * sum_RN, 0.0)  # a shard without a finite logit: -inf·0
    log_sum_N = sum_N.log()
    entropy_N = log_sum_N - ((weighted_RN + shifted_RN) * scale_RN).sum(0) / sum_N
    square_N = (square_RN * scale_RN.square()).sum(0) / sum_N.square()
    label_N = label_below_maximum(label_RN, shift_RN, owner_N)
    correct_N = is_first_at_maximum(label_N).to(label_N.dtype)
    nll, confidence = [], []
    for temperature, sum_at_RN in zip(temperatures, sums_RFN[:, FIXED:].unbind(1), strict=True):
        sum_at_N = (sum_at_RN * (shift_RN / temperature).exp()).sum(0)
        nll.append(sum_at_N.log() - label_N / temperature)
        confidence.append(1 / sum_at_N)
    figures = Figures(
        log_sum_N - label_N, 1 / sum_N, correct_N, entropy_N, square_N, _last(nll, sum_N), _last(confidence, sum_N)
    )
    return figures, Base(maximum_N, log_sum_N)


def unsmoothed_sums(
    z_nK: Tensor, base: Base, target_n: Tensor, call: LossCall, floor: float, temperatures: tuple[float, ...]
) -> Tensor:
    """Return this rank's sums of `w = max((p - ε·u) / (1-ε), floor·u)`, `[FIXED + G, n]`: in `combine`'s order.

    They are taken of log w, whose softmax is w divided by its sum. Overwrites the logits.
    """
    log_p_nK = z_nK.sub_(base.maximum.unsqueeze(1)).sub_(base.log_sum.unsqueeze(1))
    log_w_nK = log_unsmoothed(log_p_nK, call.options.label_smoothing, _prior(call), floor, normalise=False)
    return shard_sums(log_w_nK, target_n, call, temperatures)


def log_unsmoothed(
    log_p: Tensor, label_smoothing: float, prior: Tensor | float, floor: float, normalise: bool = True
) -> Tensor:
    """Return `log max((p - ε·u) / (1-ε), floor·u)`, over the last dimension; of a distribution if normalised."""
    w = (log_p.exp() - label_smoothing * prior) / (1 - label_smoothing)
    w = w.clamp_(min=floor * prior) if isinstance(prior, float) else torch.maximum(w, floor * prior)
    return (w / w.sum(-1, keepdim=True) if normalise else w).log_()


def _prior(call: LossCall) -> Tensor | float:
    return 1 / call.shard.vocab_size if call.prior is None else call.prior


def _last(columns: list[Tensor], like_N: Tensor) -> Tensor:
    return torch.stack(columns, -1) if columns else like_N.new_zeros(len(like_N), 0)
