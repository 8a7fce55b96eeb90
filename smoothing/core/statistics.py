"""Softmax statistics of a vocabulary shard, and the loss that all shards' statistics add up to.

Legend: T tokens, K real columns of this rank, R ranks, F statistics. Each rank describes each token by

    m_r = max z_v     s_r = Σ exp(z_v - m_r)     t_r = Σ p_v (z_v - m_r)     c_r = Σ u_v (z_v - m_r)

over its own columns, where `p` is the label distribution (one-hot: t_r = z_y - m_r on the rank that owns y)
and `u` the smoothing prior. Everything is relative to a maximum, so a common offset of the logits cancels
before it can cost digits, and no `log(exp(x))` is taken anywhere.

Where statistics of tokens are asked for, the zero `t_r` of a label that attains the maximum tells one thing more: it
is -0.0 where an earlier column attains it too, so that the first index wins, as in `argmax`. That costs no byte.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class ShardStatistics(NamedTuple):
    """One rank's statistics, each `[T]`.

    `label_mass` (Σ p_v) only with labels that are distributions; no `prior` where Σ u_v z_v is known otherwise.
    """

    maximum: Tensor
    sum_exp: Tensor
    label: Tensor
    prior: Tensor | None
    label_mass: Tensor | None = None

    @classmethod
    def nothing(cls, tokens: int, soft: bool, prior: bool = True, **options: Any) -> "ShardStatistics":
        """Return the statistics of a rank without any real column."""
        zeros_T = torch.zeros(tokens, **options)
        maximum_T = torch.full_like(zeros_T, -torch.inf)
        return cls(maximum_T, zeros_T, zeros_T, zeros_T if prior else None, zeros_T if soft else None)

    def stack(self) -> Tensor:
        """`[F, T]`, as it travels."""
        return torch.stack([field for field in self if field is not None])


class Combined(NamedTuple):
    """What all ranks know of each token after the exchange, each `[T]`; logits relative to `maximum`."""

    maximum: Tensor  # M = max over the whole vocabulary
    log_sum_exp: Tensor  # lse(z) - M
    label: Tensor  # Σ p_v (z_v - M), which is z_y - M for a hard label
    prior: Tensor  # Σ u_v (z_v - M); 0 until it is known where the ranks did not exchange it
    label_mass: Tensor  # Σ p_v, 1 for a hard label


class Losses(NamedTuple):
    """The losses of tokens, `[T]`, 0 without a label; where a kernel made them, sums over each program's tokens."""

    loss_T: Tensor
    partial_3P: Tensor | None = None


def add_up(stats_RFT: Tensor, label_owner_T: Tensor | None, prior_mass_R: Tensor | None) -> Combined:
    """All ranks' statistics as one, in the same order everywhere, hence to the same bits.

        M = max m_r      lse - M = log Σ s_r·exp(m_r - M)      Σ u_v (z_v - M) = Σ_r c_r + U_r·(m_r - M)

    Args:
        stats_RFT: the statistics of each rank, in the order of the ranks.
        label_owner_T: the rank that holds each token's label, None where labels are distributions.
        prior_mass_R: U_r, the prior mass of each rank's shard; None if the statistics have no `prior`.
    """
    maximum_RT, sum_exp_RT, label_RT = stats_RFT[:, :3].unbind(1)
    maximum_T = maximum_RT.amax(0)
    shift_RT = maximum_RT - maximum_T
    log_sum_exp_T = (sum_exp_RT * shift_RT.exp()).sum(0).log()
    if label_owner_T is not None:
        label_T = label_below_maximum(label_RT, shift_RT, label_owner_T)
        label_mass_T = torch.ones_like(maximum_T)
    else:
        label_mass_RT = stats_RFT[:, -1]
        label_T = _shifted_sum(label_RT, label_mass_RT, shift_RT)
        label_mass_T = label_mass_RT.sum(0)
    prior_T = torch.zeros_like(maximum_T)
    if prior_mass_R is not None:
        prior_T = _shifted_sum(stats_RFT[:, 3], prior_mass_R.unsqueeze(1).to(shift_RT.dtype), shift_RT)
    return Combined(maximum_T, log_sum_exp_T, label_T, prior_T, label_mass_T)


def label_below_maximum(label_RT: Tensor, shift_RT: Tensor, owner_T: Tensor) -> Tensor:
    """`z_y - M`, `[T]`; -0.0 for a label that attains M after an earlier column. `shift` is m_r - M of each rank."""
    owner_1T = owner_T.unsqueeze(0)
    label_T, shift_T = (x_RT.gather(0, owner_1T).squeeze(0) for x_RT in (label_RT, shift_RT))
    label_T = torch.where(shift_T == 0, label_T, label_T + shift_T)  # -0.0 + 0.0 would lose the sign
    if len(shift_RT) == 1:
        return label_T
    earlier_R1 = torch.arange(len(shift_RT), device=owner_T.device).unsqueeze(1)
    beaten_T = ((shift_RT == 0) & (earlier_R1 < owner_1T)).any(0)
    return torch.where(beaten_T & (label_T == 0), -0.0, label_T)


def is_first_at_maximum(label_T: Tensor) -> Tensor:
    """Whether labels are what `argmax` finds, by `label_below_maximum`."""
    return (label_T == 0) & ~label_T.signbit()


def token_loss(combined: Combined, label_smoothing: float, z_loss: float) -> Tensor:
    """The loss of each token, `[T]`:  `(lse-M)·Σq - (1-ε)·Σp(z-M) - ε·Σu(z-M) + z_loss·lse²`."""
    mass_T = (1 - label_smoothing) * combined.label_mass + label_smoothing
    loss_T = mass_T * combined.log_sum_exp
    if label_smoothing < 1:
        loss_T = loss_T - (1 - label_smoothing) * combined.label
    if label_smoothing > 0:
        loss_T = loss_T - label_smoothing * combined.prior
    if z_loss > 0:
        loss_T = loss_T + z_loss * (combined.maximum + combined.log_sum_exp).square()
    return loss_T


def _shifted_sum(sum_RT: Tensor, mass_RT: Tensor, shift_RT: Tensor) -> Tensor:
    # A shard without mass may have a shift of -inf (it is all padding, or all its logits are -inf): 0·inf is not 0.
    return (sum_RT + torch.where(mass_RT != 0, mass_RT * shift_RT, 0.0)).sum(0)
