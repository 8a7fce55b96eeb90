"""Sums of the fused head's gradients over chunks of tokens, in fp32 (fp64 for fp64); rounded once, by the caller.

Legend: N labelled tokens, n those of a chunk, S rows of this rank's weight, K real ones, H hidden. With the token
weight g_t (what the loss is scaled by) and s_t = g_t·(1 + 2·z_loss·lse)·exp(m_r - lse), so that s·e = g·softmax for
the e = exp(z - m_r) that the statistics left behind:

    grad_h = s·(e·W) - (1-ε)·g·W_y - ε·g·w̄          grad_W = eᵀ·(s·h) - (1-ε)·Σ_{t: y_t=v} g_t h_t - ε·u ⊗ Σ g_t h_t

The smoothing part is one vector for `grad_h` and one rank-one matrix for `grad_W`; it never meets a [n, K] tile,
where ε/V would drown in the rounding of a probability. On the CPU, where GEMMs run in fp32 or fp64, neither do s and
the labels, so no pass over the tile is needed at all, and e·W does not wait for the other ranks ("factored"). Other
cases (soft labels, a softcap, a low-precision GEMM) make the gradient's tile explicitly.

The factors of a GEMM in fp16 are kept near 1, where it does not underflow: g is divided by a power of two, and the
sums are multiplied by it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smoothing.core.collectives import start_all_reduce
from smoothing.linear import matmul
from smoothing.shard import VocabShard


class Wanted(NamedTuple):
    """Which gradients a caller needs."""

    hidden: bool
    weight: bool
    bias: bool


class TokenWeights(NamedTuple):
    """What the losses of tokens are scaled by, `g_t / unit`."""

    weight_N: Tensor
    unit: Tensor | None  # `[]`, a power of two; None for 1

    @classmethod
    def of(cls, weight_N: Tensor, gemm_dtype: torch.dtype) -> "TokenWeights":
        if gemm_dtype != torch.float16:
            return cls(weight_N, None)
        unit = power_of_two(weight_N)
        return cls(weight_N / unit, unit)


def power_of_two(weights_N: Tensor) -> Tensor:
    """Return the largest power of two in the largest magnitude, which scales without rounding; 1 for zeros."""
    largest = F.pad(weights_N, (0, 1)).abs().amax()
    exponent = torch.where(largest > 0, torch.frexp(largest).exponent - 1, 0)
    return torch.exp2(exponent.clamp(-126, 127).to(weights_N.dtype))  # normal numbers


class LabelTerms(NamedTuple):
    """What a chunk's labels add to the gradient of its logits: `weight_m1` at `(row_m, column_m)`."""

    row_m: Tensor
    column_m: Tensor
    weight_m1: Tensor


class LogitsGradient(NamedTuple):
    """The gradient of a chunk's logits, `[n, K]`: `scale_n1·factor_nK` and the labels, or the factor alone."""

    factor_nK: Tensor
    scale_n1: Tensor | None = None
    labels: LabelTerms | None = None


class PriorGradient(NamedTuple):
    """What smoothing adds to the gradients of weight and bias: `row ⊗ hidden` and `row·weight`."""

    row_K1: Tensor  # -ε·u, or `[1, 1]` where it is uniform
    hidden_H: Tensor  # Σ g_t h_t
    weight: Tensor  # Σ g_t, `[]`


class GradientAccumulator:
    """Sums of the gradients that are wanted: `add` every chunk, then `finish`.

    Args:
        wanted: which gradients are summed.
        hidden_NH: hidden states of the tokens.
        weight_KH: this rank's real rows of the weight.
        weights: what the tokens' losses are scaled by; the sums have their dtype.
        prior: what smoothing adds to the gradients of weight and bias, or None.
        gemm_dtype: dtype of the factors of the matrix products.
        shard: whose ranks' hidden gradients are summed.
    """

    def __init__(
        self,
        wanted: Wanted,
        hidden_NH: Tensor,
        weight_KH: Tensor,
        weights: TokenWeights,
        prior: PriorGradient | None,
        gemm_dtype: torch.dtype,
        shard: VocabShard,
    ):
        self.wanted, self.weights = wanted, weights
        self._hidden_NH, self._weight_KH, self._gemm_dtype, self._shard = hidden_NH, weight_KH, gemm_dtype, shard
        self._reductions: list[Callable[[], object]] = []
        real_size, hidden = weight_KH.shape
        dtype, device = weights.weight_N.dtype, weight_KH.device
        self._grad_NH = torch.empty(len(hidden_NH) if wanted.hidden else 0, hidden, dtype=dtype, device=device)
        self._grad_SH = torch.empty(shard.size if wanted.weight else 0, hidden, dtype=dtype, device=device)
        self._grad_S = torch.zeros(shard.size if wanted.bias else 0, dtype=dtype, device=device)
        if wanted.weight and prior is not None:
            torch.mul(prior.row_K1.expand(real_size, 1), prior.hidden_H, out=self._grad_SH[:real_size])
            self._grad_SH[real_size:] = 0
        elif wanted.weight:
            self._grad_SH.zero_()
        if prior is not None and wanted.bias:
            self._grad_S[:real_size] += (prior.row_K1 * prior.weight).squeeze(1)

    def multiply(self, tokens: slice, factor_nK: Tensor) -> None:
        """Compute a chunk's `factor·W`, which needs no other rank, if the gradient of the hidden states is wanted."""
        if self.wanted.hidden:
            matmul.hidden_gradient(factor_nK, self._weight_KH, self._grad_NH[tokens])

    def add(self, tokens: slice, gradient: LogitsGradient, multiplied: bool) -> None:
        """Add a chunk. `multiplied`: its factor has been given to `multiply` already.

        Collectives: one all-reduce of [n, H], started here, if the gradient of the hidden states is wanted.
        """
        exact_nK, scale_n1, labels = gradient
        factor_nK, real_size = self._narrowed(exact_nK), exact_nK.shape[1]
        if self.wanted.hidden:
            if not multiplied:
                self.multiply(tokens, factor_nK)
            grad_nH = self._grad_NH[tokens]
            if scale_n1 is not None:
                grad_nH.mul_(scale_n1)
            if labels is not None:
                grad_nH.index_add_(
                    0, labels.row_m, self._weight_KH[labels.column_m].to(grad_nH.dtype) * labels.weight_m1
                )
            self._reductions.append(start_all_reduce(grad_nH, self._shard))
        if self.wanted.weight:
            hidden_nH = self._hidden_NH[tokens].to(self._gemm_dtype)
            scaled_nH = hidden_nH if scale_n1 is None else hidden_nH * scale_n1
            matmul.add_weight_gradient(self._grad_SH[:real_size], factor_nK, scaled_nH)
            if labels is not None:
                self._grad_SH.index_add_(0, labels.column_m, hidden_nH[labels.row_m] * labels.weight_m1)
        if self.wanted.bias:  # of what is not rounded
            if scale_n1 is None:
                self._grad_S[:real_size] += exact_nK.sum(0)
            else:
                self._grad_S[:real_size].addmv_(exact_nK.t(), scale_n1.squeeze(1))
            if labels is not None:
                self._grad_S.index_add_(0, labels.column_m, labels.weight_m1.squeeze(1))

    def finish(self, mean_row_H: Tensor | None, label_smoothing: float) -> list[Tensor | None]:
        """Wait for the other ranks' parts, and add what smoothing by `w̄` makes of the hidden gradient.

        Returns:
            The sums `[N, H]`, `[S, H]` and `[S]`, None for those that are not wanted.
        """
        for wait in self._reductions:
            wait()
        if self.wanted.hidden and mean_row_H is not None:
            share_N1 = (self.weights.weight_N * -label_smoothing).unsqueeze(1)
            self._grad_NH.addcmul_(share_N1, mean_row_H)
        sums = [self._grad_NH, self._grad_SH, self._grad_S]
        if self.weights.unit is not None:
            sums = [total.mul_(self.weights.unit) for total in sums]
        return [total if want else None for total, want in zip(sums, self.wanted, strict=True)]

    def _narrowed(self, exact_nK: Tensor) -> Tensor:
        if exact_nK.dtype == self._gemm_dtype:
            return exact_nK
        return matmul.tile((exact_nK.shape[0], exact_nK.shape[1]), self._gemm_dtype, exact_nK.device).copy_(exact_nK)
