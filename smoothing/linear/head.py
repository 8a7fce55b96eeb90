"""The head of a language model as its loss sees it: logits a chunk of tokens at a time, never all of them.

Legend: N labelled tokens, n those of a chunk, S rows of this rank's weight, K real ones, H hidden, R ranks.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from smoothing.core.agreement import Handshake
from smoothing.core.call import LossCall
from smoothing.core.collectives import start_all_gather, start_all_reduce
from smoothing.core.statistics import Combined, ShardStatistics
from smoothing.kernels.dispatch import Backend, backend_for, uses_triton
from smoothing.linear import matmul
from smoothing.linear.gradients import HeadGradients, Tile
from smoothing.linear.statistics import consume

# A chunk's logits take this part of what the widest shard's weight takes in fp32, beside a gradient of that size; and
# not less than so many bytes, below which the products lose speed. On a device more: each chunk reads and writes the
# sum of the weight's gradient, which takes as long as the products of some 300 tokens. There half is free where the
# weight is bf16: when the chunks are done, its gradient's rounding takes as much. (H/2 tokens a chunk on one rank.)
CHUNK_OF_WEIGHT, DEVICE_CHUNK_OF_WEIGHT = 1 / 4, 1 / 2
LEAST_CHUNK_BYTES, LEAST_DEVICE_CHUNK_BYTES = 16 << 20, 256 << 20
PIECE = 1024  # hidden states that are widened at a time


def default_chunk_bytes(weight_bytes: int, device: bool) -> int:
    """What a chunk's logits may take beside a weight of so many bytes in fp32."""
    share = DEVICE_CHUNK_OF_WEIGHT if device else CHUNK_OF_WEIGHT
    return max(LEAST_DEVICE_CHUNK_BYTES if device else LEAST_CHUNK_BYTES, int(weight_bytes * share))


def chunk_length(tokens: int, most: int) -> int:
    """Tokens of a chunk: as few chunks as `most` allows, alike in length; a multiple of 8 where that leaves them so.

    A last chunk of a few tokens would cost a pass over weight and gradient all the same.
    """
    chunks = max(1, math.ceil(tokens / most))
    alike = math.ceil(tokens / chunks)
    rounded = 8 * math.ceil(alike / 8)
    last = tokens - (chunks - 1) * rounded
    return rounded if rounded <= most and 2 * last >= alike else alike


@dataclass
class LinearHead:
    """Hidden states of the labelled tokens, and this rank's real rows of the weight, in the products' dtypes."""

    call: LossCall
    hidden_NH: Tensor
    weight_KH: Tensor
    bias_K: Tensor | None
    chunk_bytes: int | None
    size: int  # S

    @classmethod
    def of(cls, call: LossCall, hidden_NH: Tensor, weight_SH: Tensor, bias_S: Tensor | None, chunk_bytes: int | None):
        """From the caller's tensors, cast to the dtype that the call computes in."""
        real_size, dtype = call.shard.real_size, call.input_dtype
        bias_K = None if bias_S is None else bias_S[:real_size].to(dtype).to(call.statistics_dtype)
        weight_KH = weight_SH[:real_size].to(dtype)
        return cls(call, hidden_NH.to(dtype), weight_KH, bias_K, chunk_bytes, call.shard.size)

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
        """The gradient's tile is never made (see `linear_gradients`)."""
        on_cpu = self.hidden_NH.device.type == "cpu" and not uses_triton(self.hidden_NH.device, self.call)
        return on_cpu and self.linear and not self.call.soft

    def hidden(self, tokens: slice) -> Tensor:
        return self.hidden_NH[tokens].to(self.gemm_dtype)

    def prior_column(self) -> Tensor:
        """`u`, `[K, 1]`, or `[1, 1]` where it is uniform."""
        if self.call.prior is not None:
            return self.call.prior.unsqueeze(1)
        uniform = 1 / self.call.shard.vocab_size
        return torch.full((1, 1), uniform, dtype=self.call.statistics_dtype, device=self.hidden_NH.device)

    def weighted_hidden_sum(self, token_weight_N: Tensor) -> Tensor:
        """`Σ_t g_t h_t`, `[H]`."""
        sum_H = torch.zeros(self.hidden_NH.shape[1], dtype=self.call.statistics_dtype, device=self.hidden_NH.device)
        for start in range(0, self.call.tokens, PIECE):
            tokens = slice(start, start + PIECE)
            sum_H.addmv_(self.hidden_NH[tokens].to(sum_H.dtype).t(), token_weight_N[tokens])
        return sum_H

    def mean_row_part(self) -> Tensor:
        """This shard's part of `w̄ = Σ_v u_v W_v`, and of `b̄ = Σ_v u_v b_v` as one more number: `[H + 1]`."""
        dtype, prior_K = self.call.statistics_dtype, self.prior_column().squeeze(1)
        row_H = matmul.weighted_row(self.weight_KH, self.call.prior, self.call.shard.vocab_size, dtype)
        bias = row_H.new_zeros(())
        if self.bias_K is not None:
            bias = torch.where(prior_K != 0, prior_K * self.bias_K, 0.0).sum()
        return torch.cat([row_H, bias.unsqueeze(0)])

    def prior_logit(self, mean_row_H: Tensor, mean_bias: Tensor, maximum_N: Tensor) -> Tensor:
        """`Σ_v u_v z_v - M = h·w̄ + b̄ - M`, `[N]`."""
        dot_N = torch.cat([h_nH.to(mean_row_H.dtype) @ mean_row_H for h_nH in self.hidden_NH.split(PIECE)])
        return dot_N + mean_bias - maximum_N

    def chunks(self, widest: int, buffers: int) -> tuple[list[slice], list[Tensor]]:
        """Tokens of each chunk, the same on every rank, and the buffers that logits take turns in.

        The widest shard's logits fit the budget, so every rank makes the same chunks whatever its own shard.
        """
        dtype = self.call.statistics_dtype
        # where there is a bias, a low-precision GEMM takes a copy of the gradient
        copied = self.bias_K is not None and self.gemm_dtype != dtype
        element = dtype.itemsize * buffers + (self.gemm_dtype.itemsize if copied else 0)
        device = self.hidden_NH.device
        budget = self.chunk_bytes
        if budget is None:
            weight_bytes = widest * self.weight_KH.shape[1] * dtype.itemsize
            budget = default_chunk_bytes(weight_bytes, device.type != "cpu")
        tokens = self.call.tokens
        most = max(1, budget // (element * max(1, widest)))
        step = chunk_length(tokens, most)
        slices = [slice(start, min(start + step, tokens)) for start in range(0, tokens, max(1, step))]
        shape = (min(step, tokens), len(self.weight_KH))
        return slices, [matmul.tile(shape, dtype, device) for _ in range(min(buffers, len(slices)))]

    def logits(self, tokens: slice, buffer: Tensor) -> Tensor:
        """`[n, K]` logits, before any softcap. One GEMM."""
        z_nK = matmul.logits(self.hidden(tokens), self.weight_KH, buffer[: tokens.stop - tokens.start])
        return z_nK if self.bias_K is None else z_nK.add_(self.bias_K)

    def statistics(self, z_nK: Tensor, tokens: slice) -> ShardStatistics:
        """Of a chunk's logits. Where the gradient is factored they become `exp(z - m)` on the way."""
        target = self.call.target[tokens]
        if self.factored:
            return consume(z_nK, target, self.call)
        return self.backend.statistics(z_nK, target, self.call, with_prior=not self.linear)

    def forward(
        self, end_handshake: Callable[[], Handshake], gradients: HeadGradients | None
    ) -> tuple[Combined, Tensor | None, Handshake]:
        """Statistics of every token, `w̄` where smoothing needs it, and the handshake; gradients added up on the way.

        The statistics of a chunk travel while `e·W` of the same chunk (factored) or the logits of the next one are
        computed. Collectives: one all-reduce of `[H + 1]` with smoothing and no softcap; and for each chunk one
        all-gather of 12 bytes a token (16 with a softcap or probabilities, 20 with both), and `HeadGradients.add`'s.
        """
        call = self.call
        smoothed = self.linear and call.options.label_smoothing > 0 and call.tokens > 0
        mean_row_H1 = self.mean_row_part() if smoothed else None
        handshake = end_handshake()  # before any other collective: ranks that do not agree get no further
        wait_for_mean_row = start_all_reduce(mean_row_H1, call.shard) if smoothed else None
        alone = call.shard.world_size == 1
        # e·W of a chunk needs no other rank, and gives its statistics the time to travel
        lookahead = 0 if alone or (gradients is not None and gradients.wanted.hidden and self.factored) else 1
        slices, buffers = self.chunks(handshake.widest, 1 + lookahead if gradients is not None else 1)
        under_way, parts = deque(), []
        for turn, tokens in enumerate(slices):
            z_nK = self.logits(tokens, buffers[turn % len(buffers)])
            own = self.statistics(z_nK, tokens)
            stats_Fn = own.stack()
            tile = Tile(tokens, z_nK, own.maximum)
            under_way.append(_UnderWay(tile, stats_Fn.shape, start_all_gather(stats_Fn, call.shard)))
            if gradients is not None:
                gradients.start(tile)
            if len(under_way) > lookahead:
                parts.append(self._finish(under_way.popleft(), gradients, handshake))
        parts += [self._finish(chunk, gradients, handshake) for chunk in under_way]
        combined = self._joined(parts)
        if not smoothed:
            return combined, None, handshake
        wait_for_mean_row()
        mean_row_H, mean_bias = mean_row_H1[:-1], mean_row_H1[-1]
        prior_N = self.prior_logit(mean_row_H, mean_bias, combined.maximum)
        return combined._replace(prior=prior_N), mean_row_H, handshake

    def _finish(self, chunk: "_UnderWay", gradients: HeadGradients | None, handshake: Handshake) -> Combined:
        stats_RFn, target = chunk.statistics().unflatten(1, chunk.shape_Fn), self.call.target[chunk.tile.tokens]
        options = {"with_prior": not self.linear}
        combined, scale_n, _ = self.backend.combine(stats_RFn, handshake.headers_RH, target, self.call, **options)
        if gradients is not None:
            gradients.add(chunk.tile, combined, scale_n)
        return combined

    def _joined(self, parts: list[Combined]) -> Combined:
        if not parts:
            nothing = torch.zeros(0, dtype=self.call.statistics_dtype, device=self.hidden_NH.device)
            return Combined(*[nothing] * 5)
        return Combined(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def backward(self, handshake: Handshake, combined: Combined, gradients: HeadGradients) -> None:
        """Gradients with the logits computed anew. Collectives: those of `HeadGradients.add`."""
        slices, buffers = self.chunks(handshake.widest, 1)
        for tokens in slices:
            z_nK = self.logits(tokens, buffers[0])
            own = Combined(*(field[tokens] for field in combined))
            if self.factored:
                z_nK.sub_(own.maximum.unsqueeze(1)).exp_()
            tile = Tile(tokens, z_nK, own.maximum)
            gradients.start(tile)
            gradients.add(tile, own, self.call.softmax_scale(own))


class _UnderWay(NamedTuple):
    """A chunk whose statistics travel."""

    tile: Tile
    shape_Fn: torch.Size
    statistics: Callable[[], Tensor]
