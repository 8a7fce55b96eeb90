"""Gradients of the fused head, summed over chunks of tokens in fp32 and rounded once.

Legend: N labelled tokens, n those of a chunk, K real rows of this rank's weight, H hidden. With the token weight
g_t (what the loss is scaled by) and s_t = g_t·(1 + 2·z_loss·lse)·exp(m_r - lse), so that s·e = g·softmax for the
e = exp(z - m_r) that the statistics left behind:

    grad_h = s·(e·W) - (1-ε)·g·W_y - ε·g·w̄          grad_W = eᵀ·(s·h) - (1-ε)·Σ_{t: y_t=v} g_t h_t - ε·u ⊗ Σ g_t h_t

The smoothing part is one vector for `grad_h` and one rank-one matrix for `grad_W`; it never meets a [n, K] tile,
where ε/V would drown in the rounding of a probability. On the CPU, where GEMMs run in fp32 or fp64, neither do s and
the labels, so no pass over the tile is needed at all, and e·W does not wait for the other ranks ("factored"). Other
cases (soft labels, a softcap, a low-precision GEMM) make the gradient's tile explicitly. The factors of a
GEMM in fp16 are kept near 1, where it does not underflow: g is divided by a power of two, and the sums are multiplied
by it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from smoothing.core.call import LossCall
from smoothing.core.collectives import start_all_reduce
from smoothing.core.statistics import Combined
from smoothing.linear import matmul


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool


class Tile(NamedTuple):
    """One chunk's logits, in a buffer that is used again; where the gradient is factored, `exp(z - m)`."""

    tokens: slice
    z_nK: Tensor
    maximum_n: Tensor  # m


def power_of_two(weights_N: Tensor) -> Tensor:
    """The largest power of two in the largest magnitude, which scales without rounding; 1 for zeros, or none."""
    largest = F.pad(weights_N, (0, 1)).abs().amax()
    exponent = torch.where(largest > 0, torch.frexp(largest).exponent - 1, 0)
    return torch.exp2(exponent.clamp(-126, 127).to(weights_N.dtype))  # normal numbers


class HeadGradients:
    """Sums of the three gradients; `add` every chunk, then `finish`."""

    def __init__(self, head, call: LossCall, wanted: Wanted, token_weight_N: Tensor):
        self.head, self.call, self.wanted = head, call, wanted
        self.unit = power_of_two(token_weight_N) if head.gemm_dtype == torch.float16 else None
        self.token_weight_N = token_weight_N = token_weight_N if self.unit is None else token_weight_N / self.unit
        self.reductions = []
        epsilon, dtype = call.options.label_smoothing, call.statistics_dtype
        real_size, hidden = head.weight_KH.shape
        device = head.weight_KH.device
        if wanted.hidden:
            self.hidden_NH = torch.empty(call.tokens, hidden, dtype=dtype, device=device)
        share = epsilon if head.linear else 0.0
        prior_K1 = head.prior_column() * -share
        if wanted.weight:
            self.weight_SH = torch.empty(head.size, hidden, dtype=dtype, device=device)
            self.weight_SH[real_size:] = 0
            if share > 0:
                sum_H = head.weighted_hidden_sum(token_weight_N)
                torch.mul(prior_K1.expand(real_size, 1), sum_H, out=self.weight_SH[:real_size])
            else:
                self.weight_SH.zero_()
        if wanted.bias:
            self.bias_S = torch.zeros(head.size, dtype=dtype, device=device)
            self.bias_S[:real_size] += (prior_K1 * token_weight_N.sum()).squeeze(1)

    def start(self, tile: Tile) -> None:
        """Compute what of a chunk's gradient needs no other rank: `e·W`, where it is factored and wanted."""
        if self.wanted.hidden and self.head.factored:
            matmul.hidden_gradient(tile.z_nK, self.head.weight_KH, self.hidden_NH[tile.tokens])

    def add(self, tile: Tile, combined: Combined, scale_n: Tensor) -> None:
        """Add a chunk's gradient, once what all ranks know of its tokens is known; `LossCall.softmax_scale` of it.

        Collectives: one all-reduce of [n, H] if the hidden gradient is wanted.
        """
        (self._add_factored if self.head.factored else self._add_explicit)(tile, combined, scale_n)

    def finish(self, mean_row_H: Tensor | None) -> list[Tensor | None]:
        """The sums `[N, H]`, `[S, H]` and `[S]` in the statistics' dtype, those that were wanted."""
        for wait in self.reductions:
            wait()
        if self.wanted.hidden and mean_row_H is not None:
            share_N1 = (self.token_weight_N * -self.call.options.label_smoothing).unsqueeze(1)
            self.hidden_NH.addcmul_(share_N1, mean_row_H)
        names = ("hidden_NH", "weight_SH", "bias_S")
        sums = [getattr(self, name) if want else None for name, want in zip(names, self.wanted, strict=True)]
        if self.unit is not None:
            sums = [total if total is None else total.mul_(self.unit) for total in sums]
        return sums

    def _add_factored(self, tile: Tile, combined: Combined, scale_n: Tensor) -> None:
        exp_nK, weight_n = tile.z_nK, self.token_weight_N[tile.tokens]
        scale_n1 = (scale_n * (tile.maximum_n - combined.maximum).exp() * weight_n).unsqueeze(1)
        label_share = self.call.options.label_smoothing - 1
        owned_n, column_n = self.call.local_target(self.call.target[tile.tokens])
        owned, column = owned_n.nonzero().squeeze(1), column_n[owned_n]
        label_weight_1 = (weight_n[owned] * label_share).unsqueeze(1)
        real_size = exp_nK.shape[1]
        if self.wanted.hidden:
            grad_nH = self.hidden_NH[tile.tokens].mul_(scale_n1)
            grad_nH.index_add_(0, owned, self.head.weight_KH[column].to(grad_nH.dtype) * label_weight_1)
            self.reductions.append(start_all_reduce(grad_nH, self.call.shard))
        if self.wanted.weight:
            hidden_nH = self.head.hidden(tile.tokens)
            matmul.add_weight_gradient(self.weight_SH[:real_size], exp_nK, hidden_nH * scale_n1)
            self.weight_SH.index_add_(0, column, hidden_nH[owned] * label_weight_1)
        if self.wanted.bias:
            self.bias_S[:real_size].addmv_(exp_nK.t(), scale_n1.squeeze(1))
            self.bias_S.index_add_(0, column, label_weight_1.squeeze(1))

    def _add_explicit(self, tile: Tile, combined: Combined, scale_n: Tensor) -> None:
        head, base_n, weight_n = self.head, combined.maximum, self.token_weight_N[tile.tokens]
        # rounded in the logits' own memory; but a bias sums what is not rounded yet
        out_nK = tile.z_nK if self.wanted.bias else matmul.narrowed(tile.z_nK, head.gemm_dtype)
        target = self.call.target[tile.tokens]
        options = {"with_prior": not head.linear}
        factor_nK = head.backend.gradient(tile.z_nK, target, self.call, base_n, scale_n, weight_n, out_nK, **options)
        real_size = factor_nK.shape[1]
        if self.wanted.bias:
            self.bias_S[:real_size] += factor_nK.sum(0)
        if factor_nK.dtype != head.gemm_dtype:
            factor_nK = matmul.tile(factor_nK.shape, head.gemm_dtype, factor_nK.device).copy_(factor_nK)
        if self.wanted.hidden:
            grad_nH = matmul.hidden_gradient(factor_nK, head.weight_KH, self.hidden_NH[tile.tokens])
            self.reductions.append(start_all_reduce(grad_nH, self.call.shard))
        if self.wanted.weight:
            matmul.add_weight_gradient(self.weight_SH[:real_size], factor_nK, head.hidden(tile.tokens))
