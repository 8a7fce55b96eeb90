"""The fused head's loop in bf16 on a device: logits in bf16, their gradient in their place, at the products' rate.

Legend: N labelled tokens, n those of a piece, K real rows of this rank's weight, H hidden, E further rows.

    grad_W = [-share·ε·u·1ᵀ ; G]ᵀ · [Σ h ; h]          G = share·(softmax - (1-ε)·onehot), in bf16

The smoothing term rides in the product of the weight's gradient as E further rows of its inner dimension, added in
the product's own fp32 accumulator: Σ h in three bf16 parts, ε·u rounded as the gradient in the tile is, so that what
cancels in exact arithmetic cancels here. The gradient of the hidden states gets its `-share·ε·w̄` where it is rounded.

Tokens come in groups. A group's logits are in memory together, and its part of the weight's gradient is one product:
of a single group straight into the weight's dtype, of several into a sum in fp32, rounded at the end. Where ranks
share the vocabulary a group has two pieces, so that the statistics of each travel under a product of the other, and
the gradient of the hidden states under the product of the weight's.

Where tokens weigh differently (`reduction="none"`) hidden states are scaled instead of G: what a token weighs is then
rounded once, for both terms.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from smoothing.core.agreement import Handshake
from smoothing.core.call import LossCall
from smoothing.core.collectives import start_all_gather, start_all_reduce
from smoothing.core.statistics import Losses
from smoothing.kernels import head_ops, triton_ops
from smoothing.kernels.triton_ops import Numbers, States
from smoothing.linear import matmul
from smoothing.linear.accumulator import Wanted
from smoothing.linear.chunks import bf16_groups
from smoothing.linear.labelled_tokens import LabelledTokens
from smoothing.linear.loop import Result

NOTHING = Wanted(False, False, False)


class Bf16Head(NamedTuple):
    """One call's tensors and choices."""

    call: LossCall  # its targets are those of the N tokens
    labelled: LabelledTokens
    hidden_TH: Tensor
    weight_SH: Tensor
    weight_KH: Tensor  # its real rows in bf16
    wanted: Wanted
    chunk_bytes: int | None

    @classmethod
    def of(
        cls,
        call: LossCall,
        labelled: LabelledTokens,
        hidden_TH: Tensor,
        weight_SH: Tensor,
        wanted: Wanted,
        chunk_bytes: int | None,
    ) -> "Bf16Head":
        """Cast the real rows of the weight to bf16, where they are not."""
        weight_KH = weight_SH[: call.shard.real_size].to(call.input_dtype)
        return cls(call, labelled, hidden_TH, weight_SH, weight_KH, wanted, chunk_bytes)

    @property
    def smoothed(self) -> bool:
        return self.call.options.label_smoothing > 0

    def groups(self, widest: int) -> list[list[slice]]:
        """Return the pieces of each group, the same on every rank."""
        rounded = self.wanted.weight and self.weight_SH.dtype == self.call.input_dtype
        several = self.call.shard.world_size > 1
        return bf16_groups(self.call.tokens, widest, self.weight_KH.shape[1], rounded, several, self.chunk_bytes)

    def mean_row_part(self) -> Tensor:
        """Return this shard's part of Σ_v W_v where the prior is uniform, else of Σ_v u_v W_v, `[H]`."""
        if self.call.prior is None:
            return self.weight_KH.sum(0, dtype=torch.float32)
        return matmul.weighted_row(self.weight_KH, self.call.prior, self.call.shard.vocab_size, torch.float32)


def forward(
    head: Bf16Head, end_handshake: Callable[[], Handshake], items: int | Tensor | None, with_gradients: bool
) -> tuple[Result, Losses, list[Tensor | None]]:
    """Run all tokens through the head.

    Args:
        head: the head.
        end_handshake: see `LossCall.start_handshake`.
        items: what the sum of losses is divided by.
        with_gradients: whether the gradients that are wanted are made on the way.

    Returns:
        What is known of every token, the losses, and the gradients of hidden states, weight and bias, finished.

    Collectives, in this order: the end of the handshake; one all-reduce of `[H]` with smoothing; for each piece one
    all-gather of 12 bytes a token, and one all-reduce of `[n, H]` if the gradient of the hidden states is wanted.
    """
    call = head.call
    mean_row_H = head.mean_row_part() if head.smoothed else None
    handshake = end_handshake()  # before any other collective: ranks that do not agree get no further
    wait_for_mean_row = None if mean_row_H is None else start_all_reduce(mean_row_H, call.shard)
    groups = head.groups(handshake.widest)
    work = _Pass(head, groups, head.wanted if with_gradients else NOTHING, items, None)
    lengths = [piece.stop - piece.start for group in groups for piece in group]
    numbers = Numbers.empty(lengths, head.hidden_TH.device, triton_ops.STATES_BLOCK)
    parts = iter(numbers.split(lengths))
    for group in groups:
        sent: deque[tuple[slice, Callable[[], Tensor]]] = deque()
        for tokens in group:
            own_Fn = triton_ops.statistics(work.logits(tokens, group), call.target[tokens], call, with_prior=False)
            sent.append((tokens, start_all_gather(own_Fn, call.shard)))
            while len(sent) > (0 if tokens is group[-1] else 1):
                piece, receive = sent.popleft()
                target_n, own = call.target[piece], next(parts)
                states = None
                if mean_row_H is not None and wait_for_mean_row is not None:
                    wait_for_mean_row()
                    scale = head_ops.prior_share(call) / call.options.label_smoothing
                    states = States(work.states_NH[piece], mean_row_H, scale)
                stats_RFn = receive().view(-1, len(own_Fn), len(target_n))
                triton_ops.combine_into(own, stats_RFn, handshake.headers_RH, target_n, call, False, states)
                work.add(piece, group, *own.kept_2T)
        work.end_group(group)
    result = Result(numbers.combined, mean_row_H, handshake)
    return result, Losses(numbers.loss_T, numbers.partial_3P), work.finish(mean_row_H)


def backward(head: Bf16Head, result: Result, weight_N: Tensor) -> list[Tensor | None]:
    """Compute the gradients of losses scaled by `weight_N`, with the logits computed anew.

    Collectives: for each piece one all-reduce of `[n, H]` if the gradient of the hidden states is wanted.
    """
    groups = head.groups(result.handshake.widest)
    work = _Pass(head, groups, head.wanted, None, weight_N)
    scale_N = head.call.softmax_scale(result.combined)
    for group in groups:
        for tokens in group:
            work.logits(tokens, group)
            work.add(tokens, group, result.combined.maximum[tokens], scale_N[tokens])
        work.end_group(group)
    return work.finish(result.mean_row_H)


class _Pass:
    """States, tile and gradients of one pass over all tokens.

    Args:
        head: the head.
        groups: its groups of pieces.
        wanted: which gradients are made.
        items: what the sum of losses is divided by.
        weight_N: what each token's loss is scaled by instead, or None.
    """

    def __init__(
        self,
        head: Bf16Head,
        groups: list[list[slice]],
        wanted: Wanted,
        items: int | Tensor | None,
        weight_N: Tensor | None,
    ):
        self._head, self._wanted, self._weight_N = head, wanted, weight_N
        call, device = head.call, head.hidden_TH.device
        real_size, hidden = head.weight_KH.shape
        riding = head.smoothed and wanted.weight
        lengths = [group[-1].stop - group[0].start for group in groups]
        self._rows = head_ops.further_rows(lengths[0]) if riding else 0
        gathered = head_ops.gather(
            head.hidden_TH, head.labelled.rows_N, call, self._rows, items, weight_N, summed=riding
        )
        self._tile_MK = matmul.tile((self._rows + max(lengths), real_size), call.input_dtype, device)
        if riding:  # beside the first group, and out of the way of the others
            head_ops.write_prior_rows(gathered, self._tile_MK[: self._rows], call)
        self.states_NH, self._scaled_MH = gathered.states_NH[self._rows :], gathered.scaled_NH
        self._share = gathered.share
        self._products_NH = torch.empty(
            call.tokens if wanted.hidden else 0, hidden, dtype=torch.float32, device=device
        )
        self._waits: list[Callable[[], object]] = []
        self._sum_SH: Tensor | None = None
        given = head.weight_SH.dtype
        direct = given == torch.float32 or (given == call.input_dtype and len(groups) == 1)
        self._sum_dtype = given if direct else torch.float32

    def logits(self, tokens: slice, group: list[slice]) -> Tensor:
        """Compute a piece's logits, `[n, K]`, in the tile."""
        return matmul.logits(self.states_NH[tokens], self._head.weight_KH, self._part(tokens, group))

    def _part(self, tokens: slice, group: list[slice]) -> Tensor:
        """A piece's rows of the tile."""
        start = self._rows - group[0].start
        return self._tile_MK[start + tokens.start : start + tokens.stop]

    def add(self, tokens: slice, group: list[slice], maximum_n: Tensor, scale_n: Tensor) -> None:
        """Put the gradient in the logits' place, and multiply it by the weight, if a gradient is wanted.

        Collectives: one all-reduce of `[n, H]`, started here, if that of the hidden states is.
        """
        if not any(self._wanted):
            return
        call, z_nK = self._head.call, self._part(tokens, group)
        target_n = call.target[tokens]
        triton_ops.gradient(z_nK, target_n, call, maximum_n, scale_n, self._share, z_nK, with_prior=False)
        if self._wanted.hidden:
            product_nH = self._products_NH[tokens]
            matmul.hidden_gradient(z_nK, self._head.weight_KH, product_nH)
            self._waits.append(start_all_reduce(product_nH, call.shard))

    def end_group(self, group: list[slice]) -> None:
        """Multiply a group's gradient by its hidden states, if that of the weight is wanted."""
        if not self._wanted.weight:
            return
        start, stop = self._rows + group[0].start, self._rows + group[-1].stop
        real_size, hidden = self._head.weight_KH.shape
        tile_MK = self._tile_MK[self._rows : self._rows + stop - start]
        if self._sum_SH is not None:
            matmul.add_weight_gradient(self._sum_SH[:real_size], tile_MK, self._scaled_MH[start:stop])
            return
        size, device = self._head.call.shard.size, tile_MK.device
        self._sum_SH = torch.empty(size, hidden, dtype=self._sum_dtype, device=device)
        if size > real_size:
            self._sum_SH[real_size:] = 0
        tile_MK = self._tile_MK[: self._rows + stop - start]  # of the first group, the further rows too
        matmul.weight_gradient(tile_MK, self._scaled_MH[:stop], self._sum_SH[:real_size])

    def finish(self, mean_row_H: Tensor | None) -> list[Tensor | None]:
        """Wait for the other ranks' parts. Return the gradients, each in the dtype of what it is of, or None."""
        head = self._head
        del self._tile_MK, self._scaled_MH, self.states_NH  # rounding takes as much
        grad_hidden = grad_weight = None
        for wait in self._waits:
            wait()
        if self._wanted.hidden:
            grad_hidden = head_ops.hidden_gradient(
                self._products_NH,
                head.labelled.leading,
                head.hidden_TH.dtype,
                head.call,
                head.labelled.position_T,
                self._share,
                self._weight_N,
                mean_row_H,
            )
        del self._products_NH
        if self._sum_SH is not None:
            grad_weight, self._sum_SH = self._sum_SH.to(head.weight_SH.dtype), None
        return [grad_hidden, grad_weight, None]
