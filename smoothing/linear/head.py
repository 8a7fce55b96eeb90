"""The head of a language model as its loss sees it: logits of a chunk of tokens, and the prior's terms.

Legend: N labelled tokens, n those of a chunk, S rows of this rank's weight, K real ones, H hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from smoothing.core.call import LossCall
from smoothing.kernels.dispatch import Backend, backend_for, uses_triton
from smoothing.linear import matmul
from smoothing.linear.chunks import chunk_slices, default_chunk_bytes

PIECE = 1024  # hidden states that are widened at a time


@dataclass
class LinearHead:
    """Hidden states of the labelled tokens, and this rank's real rows of the weight, in the computing dtype."""

    call: LossCall
    hidden_NH: Tensor
    weight_KH: Tensor
    bias_K: Tensor | None
    chunk_bytes: int | None

    @classmethod
    def of(
        cls, call: LossCall, hidden_NH: Tensor, weight_SH: Tensor, bias_S: Tensor | None, chunk_bytes: int | None
    ) -> "LinearHead":
        """Cast the caller's tensors to the dtype that the call computes in."""
        real_size, dtype = call.shard.real_size, call.input_dtype
        bias_K = None if bias_S is None else bias_S[:real_size].to(dtype).to(call.statistics_dtype)
        return cls(call, hidden_NH.to(dtype), weight_SH[:real_size].to(dtype), bias_K, chunk_bytes)

    @property
    def gemm_dtype(self) -> torch.dtype:
        return matmul.gemm_dtype(self.call.input_dtype, self.call.statistics_dtype, self.hidden_NH.device)

    @property
    def linear(self) -> bool:
        """Logits are linear in the hidden states, so Σ_v u_v z_v needs no logits."""
        return self.call.options.logit_softcap is None

    @property
    def backend(self) -> Backend:
        return backend_for(self.hidden_NH.device, self.call)

    @property
    def factored(self) -> bool:
        """The gradient of the logits is never made (see `accumulator`)."""
        on_cpu = self.hidden_NH.device.type == "cpu" and not uses_triton(self.hidden_NH.device, self.call)
        return on_cpu and self.linear and not self.call.soft

    def chunks(self, widest: int, buffers: int) -> tuple[list[slice], list[Tensor]]:
        """Return the tokens of each chunk, the same on every rank, and the buffers that logits are made in by turns.

        Args:
            widest: columns of the largest shard.
            buffers: how many chunks' logits are needed at a time.
        """
        dtype, device = self.call.statistics_dtype, self.hidden_NH.device
        # where there is a bias, a low-precision GEMM takes a copy of the gradient
        copied = self.bias_K is not None and self.gemm_dtype != dtype
        element_bytes = dtype.itemsize * buffers + (self.gemm_dtype.itemsize if copied else 0)
        budget = self.chunk_bytes
        if budget is None:
            weight_bytes = widest * self.weight_KH.shape[1] * dtype.itemsize
            budget = default_chunk_bytes(weight_bytes, device.type != "cpu")
        slices = chunk_slices(self.call.tokens, element_bytes * max(1, widest), budget)
        shape = (slices[0].stop if slices else 0, len(self.weight_KH))
        return slices, [matmul.tile(shape, dtype, device) for _ in range(min(buffers, len(slices)))]

    def logits(self, tokens: slice, buffer: Tensor) -> Tensor:
        """Return `[n, K]` logits, before any softcap. One GEMM."""
        hidden_nH = self.hidden_NH[tokens].to(self.gemm_dtype)
        z_nK = matmul.logits(hidden_nH, self.weight_KH, buffer[: tokens.stop - tokens.start])
        return z_nK if self.bias_K is None else z_nK.add_(self.bias_K)

    def prior_column(self) -> Tensor:
        """Return `u`, `[K, 1]`, or `[1, 1]` where it is uniform."""
        if self.call.prior is not None:
            return self.call.prior.unsqueeze(1)
        uniform = 1 / self.call.shard.vocab_size
        return torch.full((1, 1), uniform, dtype=self.call.statistics_dtype, device=self.hidden_NH.device)

    def mean_row_part(self) -> Tensor:
        """Return this shard's part of `w̄ = Σ_v u_v W_v`, and of `b̄ = Σ_v u_v b_v` as one more number: `[H + 1]`."""
        dtype, prior_K = self.call.statistics_dtype, self.prior_column().squeeze(1)
        row_H = matmul.weighted_row(self.weight_KH, self.call.prior, self.call.shard.vocab_size, dtype)
        bias = row_H.new_zeros(())
        if self.bias_K is not None:
            bias = torch.where(prior_K != 0, prior_K * self.bias_K, 0.0).sum()
        return torch.cat([row_H, bias.unsqueeze(0)])

    def prior_logit(self, mean_row_H1: Tensor, maximum_N: Tensor) -> Tensor:
        """Return `Σ_v u_v z_v - M = h·w̄ + b̄ - M`, `[N]`."""
        mean_row_H, mean_bias = mean_row_H1[:-1], mean_row_H1[-1]
        dot_N = torch.cat([h_nH.to(mean_row_H.dtype) @ mean_row_H for h_nH in self.hidden_NH.split(PIECE)])  # type: ignore[no-untyped-call]  # torch has no types for it
        return dot_N + mean_bias - maximum_N

    def weighted_hidden_sum(self, token_weight_N: Tensor) -> Tensor:
        """Return `Σ_t g_t h_t`, `[H]`."""
        sum_H = torch.zeros(self.hidden_NH.shape[1], dtype=self.call.statistics_dtype, device=self.hidden_NH.device)
        for start in range(0, self.call.tokens, PIECE):
            tokens = slice(start, start + PIECE)
            sum_H.addmv_(self.hidden_NH[tokens].to(sum_H.dtype).t(), token_weight_N[tokens])
        return sum_H
