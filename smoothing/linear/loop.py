"""The fused head's loop over chunks of tokens: logits → statistics → combine → accumulate.

Legend: N labelled tokens, n those of a chunk, K real rows of this rank's weight, R ranks, F statistics, H hidden.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from smoothing.core.agreement import Handshake
from smoothing.core.collectives import start_all_gather, start_all_reduce
from smoothing.core.statistics import Combined
from smoothing.kernels import torch_ops
from smoothing.linear import matmul
from smoothing.linear.accumulator import (
    GradientAccumulator,
    LabelTerms,
    LogitsGradient,
    PriorGradient,
    TokenWeights,
    Wanted,
)
from smoothing.linear.head import LinearHead


class Result(NamedTuple):
    """What all ranks know of every token, `w̄` where smoothing needs it, and of one another."""

    combined: Combined
    mean_row_H: Tensor | None
    handshake: Handshake


class _Sent(NamedTuple):
    """A chunk whose statistics are on their way."""

    tokens: slice
    z_nK: Tensor
    maximum_n: Tensor
    receive: Callable[[], Tensor]  # [R, F·n]


def forward(
    head: LinearHead, end_handshake: Callable[[], Handshake], accumulator: GradientAccumulator | None
) -> Result:
    """Run all tokens through the head; gradients are accumulated on the way if there is an accumulator.

    The statistics of a chunk travel while `e·W` of the same chunk (factored) or the logits of the next are computed.

    Collectives, in this order: the end of the handshake; one all-reduce of `[H + 1]` with smoothing and no softcap;
    and for each chunk one all-gather of 12 bytes a token (16 with a softcap or probabilities, 20 with both), and one
    all-reduce of `[n, H]` if the gradient of the hidden states is wanted.
    """
    call, backend = head.call, head.backend
    smoothed = head.linear and call.options.label_smoothing > 0 and call.tokens > 0
    mean_row_H1 = head.mean_row_part() if smoothed else None
    handshake = end_handshake()  # before any other collective: ranks that do not agree get no further
    wait_for_mean_row = None if mean_row_H1 is None else start_all_reduce(mean_row_H1, call.shard)
    # e·W of a chunk needs no other rank, and gives its statistics the time to travel
    early = accumulator is not None and accumulator.wanted.hidden and head.factored
    lookahead = 0 if early or call.shard.world_size == 1 else 1
    chunks, buffers = head.chunks(handshake.widest, 1 if accumulator is None else 1 + lookahead)
    sent: deque[_Sent] = deque()
    parts: list[Combined] = []
    for index, tokens in enumerate(chunks):
        z_nK = head.logits(tokens, buffers[index % len(buffers)])
        own_Fn = _statistics(head, z_nK, tokens)
        sent.append(_Sent(tokens, z_nK, own_Fn[0], start_all_gather(own_Fn, call.shard)))
        if accumulator is not None and early:
            accumulator.multiply(tokens, z_nK)
        last = index == len(chunks) - 1
        while len(sent) > (0 if last else lookahead):
            chunk = sent.popleft()
            target = call.target[chunk.tokens]
            stats_RFn = chunk.receive().unflatten(1, (-1, len(target)))  # type: ignore[no-untyped-call]  # torch has no types for it
            combined, scale_n, _ = backend.combine(
                stats_RFn, handshake.headers_RH, target, call, with_prior=not head.linear
            )
            parts.append(combined)
            if accumulator is not None:
                _accumulate(head, accumulator, chunk.tokens, chunk.z_nK, chunk.maximum_n, combined, scale_n, early)
    combined = _joined(parts, head)
    if mean_row_H1 is None or wait_for_mean_row is None:
        return Result(combined, None, handshake)
    wait_for_mean_row()
    prior_N = head.prior_logit(mean_row_H1, combined.maximum)
    return Result(combined._replace(prior=prior_N), mean_row_H1[:-1], handshake)


def backward(head: LinearHead, result: Result, accumulator: GradientAccumulator) -> None:
    """Accumulate gradients with the logits computed anew, from what a forward has found out.

    Collectives: for each chunk one all-reduce of `[n, H]` if the gradient of the hidden states is wanted.
    """
    chunks, buffers = head.chunks(result.handshake.widest, 1)
    for tokens in chunks:
        z_nK = head.logits(tokens, buffers[0])
        combined = Combined(*(field[tokens] for field in result.combined))
        if head.factored:
            z_nK.sub_(combined.maximum.unsqueeze(1)).exp_()
        scale_n = head.call.softmax_scale(combined)
        _accumulate(head, accumulator, tokens, z_nK, combined.maximum, combined, scale_n, multiplied=False)


def new_accumulator(head: LinearHead, wanted: Wanted, token_weight_N: Tensor) -> GradientAccumulator:
    """Return an accumulator of this head's gradients, of losses that are scaled by `token_weight_N`."""
    call = head.call
    weights = TokenWeights.of(token_weight_N, head.gemm_dtype)
    prior = None
    if head.linear and call.options.label_smoothing > 0:
        row_K1 = head.prior_column() * -call.options.label_smoothing
        hidden_H = head.weighted_hidden_sum(weights.weight_N) if wanted.weight else row_K1.new_empty(0)
        prior = PriorGradient(row_K1, hidden_H, weights.weight_N.sum())
    return GradientAccumulator(wanted, head.hidden_NH, head.weight_KH, weights, prior, head.gemm_dtype, call.shard)


def _statistics(head: LinearHead, z_nK: Tensor, tokens: slice) -> Tensor:
    """Statistics of a chunk's logits; where the gradient is factored these become `exp(z - m)` on the way."""
    target = head.call.target[tokens]
    if head.factored:
        return torch_ops.statistics_in_place(z_nK, target, head.call)
    return head.backend.statistics(z_nK, target, head.call, with_prior=not head.linear)


def _accumulate(
    head: LinearHead,
    accumulator: GradientAccumulator,
    tokens: slice,
    z_nK: Tensor,
    maximum_n: Tensor,
    combined: Combined,
    scale_n: Tensor,
    multiplied: bool,
) -> None:
    """Add a chunk's gradient: of logits `z_nK`, or of `exp(z - maximum)` in their place where it is factored."""
    target, weight_n = head.call.target[tokens], accumulator.weights.weight_N[tokens]
    if head.factored:
        scale_n = scale_n * (maximum_n - combined.maximum).exp() * weight_n
        gradient = LogitsGradient(z_nK, scale_n.unsqueeze(1), _labels(head, target, weight_n))
    else:
        # rounded in the logits' own memory; but a bias sums what is not rounded yet
        out_nK = z_nK if accumulator.wanted.bias else matmul.narrowed(z_nK, head.gemm_dtype)
        gradient = LogitsGradient(
            head.backend.gradient(
                z_nK, target, head.call, combined.maximum, scale_n, weight_n, out_nK, with_prior=not head.linear
            )
        )
    accumulator.add(tokens, gradient, multiplied)


def _labels(head: LinearHead, target_n: Tensor, weight_n: Tensor) -> LabelTerms:
    """What the labels that this rank owns add to the gradient of the logits."""
    owned_n, column_n = head.call.local_target(target_n)
    row_m = owned_n.nonzero().squeeze(1)
    weight_m1 = (weight_n[row_m] * (head.call.options.label_smoothing - 1)).unsqueeze(1)
    return LabelTerms(row_m, column_n[owned_n], weight_m1)


def _joined(parts: list[Combined], head: LinearHead) -> Combined:
    if not parts:
        nothing = torch.zeros(0, dtype=head.call.statistics_dtype, device=head.hidden_NH.device)
        return Combined(*[nothing] * 5)
    return Combined(*(torch.cat(field) for field in zip(*parts, strict=True)))
