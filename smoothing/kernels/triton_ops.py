"""The two passes over a shard's logits by Triton kernels: one read for statistics, one read and write for gradients.

What is between them, a few numbers a token, is one kernel more: dozens of launches would take as long as a pass.
Whatever floating dtype and strides the logits have, no fp32 copy is made. `dispatch` says when these run,
`torch_ops` what they compute, `triton_kernels` how.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from smoothing.core import agreement
from smoothing.core.call import LossCall
from smoothing.core.statistics import Combined, Losses, ShardStatistics
from smoothing.kernels import triton_kernels

BLOCK = 4096  # columns of a row looked at together
PIECE = 512  # columns of the label's block looked at together once more
COMBINE_BLOCK = 128  # tokens whose statistics a program adds up
HIDDEN_BLOCK = 128  # columns of hidden states that it looks at together, where it does, of fewer tokens
STATES_BLOCK = 32
SUM_BLOCK = 1024  # partial sums that are looked at together
SCALE_BLOCK = 16384  # elements of a gradient that a program scales
checks_labels = True  # `combine` looks at labels too, and `reduce` asserts what it saw
COMPILER_OPTIONS = {"enable_fp_fusion": True}  # a product and a sum as one; Triton 3.10 will not by itself
_NOTHING = nullcontext()


def statistics(logits_TS: Tensor, target: Tensor, call: LossCall, with_prior: bool = True) -> Tensor:
    """This rank's statistics, `[F, T]`: one read. `with_prior=False`: Σ u_v z_v is not taken."""
    count, fields = len(target), 4 if with_prior else 3
    options, real_size = call.options, call.shard.real_size
    stats_FT = torch.empty(fields, count, dtype=torch.float32, device=logits_TS.device)
    if real_size == 0:
        return ShardStatistics.nothing(
            count, soft=False, prior=with_prior, dtype=torch.float32, device=logits_TS.device
        ).stack()
    if count:
        with on_device(logits_TS):
            triton_kernels.statistics_kernel[(count,)](
                logits_TS,
                *logits_TS.stride(),
                target.contiguous(),
                _prior(call, logits_TS),
                stats_FT,
                count,
                call.shard.start,
                real_size,
                1 / call.shard.vocab_size,
                options.ignore_index,
                options.logit_softcap or 1.0,
                CAPPED=options.logit_softcap is not None,
                WITH_STATS=call.with_stats,
                SMOOTHED=with_prior and options.label_smoothing > 0,
                WITH_FIELD=with_prior,
                UNIFORM=call.prior is None,
                BLOCK=_block(real_size),
                PIECE=min(_block(real_size), PIECE),
                **COMPILER_OPTIONS,
            )
    return stats_FT


class Numbers(NamedTuple):
    """A few numbers of each token, all of them or a slice, which `combine` writes; columns of one allocation each."""

    kept_2T: Tensor  # maximum, scale: kept for backward
    seen_4T: Tensor  # the rest of `Combined`
    loss_T: Tensor
    partial_3P: Tensor  # sums over each program's tokens: losses, labels, and those that are none
    block: int  # tokens of a program

    @classmethod
    def empty(cls, pieces: Sequence[int], device: torch.device, block: int = COMBINE_BLOCK) -> "Numbers":
        """Room for so many tokens, combined in these pieces."""

        # apart from one another: two are kept for backward, and the loss is a caller's, who may write over it
        def made(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.float32, device=device)

        tokens, programs = sum(pieces), sum(cdiv(piece, block) for piece in pieces)
        return cls(made(2, tokens), made(4, tokens), made(tokens), made(3, programs), block)

    def split(self, pieces: Sequence[int]) -> "list[Numbers]":
        """Return those of each piece, in order."""
        parts, token, program = [], 0, 0
        for piece in pieces:
            tokens, programs = slice(token, token + piece), cdiv(piece, self.block)
            kept_2n, seen_4n, loss_n = self.kept_2T[:, tokens], self.seen_4T[:, tokens], self.loss_T[tokens]
            partial_3p = self.partial_3P[:, program : program + programs]
            parts.append(Numbers(kept_2n, seen_4n, loss_n, partial_3p, self.block))
            token, program = token + piece, program + programs
        return parts

    @property
    def combined(self) -> Combined:
        return Combined(self.kept_2T[0], *self.seen_4T.unbind())


class States(NamedTuple):
    """Where Σ u_v z_v comes from where it is not among the statistics: `scale·h·mean_row`."""

    hidden_TH: Tensor
    mean_row_H: Tensor
    scale: float


def combine(
    stats_RFT: Tensor, headers_RH: Tensor | None, target: Tensor, call: LossCall, with_prior: bool = True
) -> tuple[Combined, Tensor, Losses | None]:
    """All ranks' statistics added up, their softmax scale, and the losses. See `torch_ops`."""
    numbers = Numbers.empty([len(target)], stats_RFT.device)
    combine_into(numbers, stats_RFT, headers_RH, target, call, with_prior)
    losses = Losses(numbers.loss_T, numbers.partial_3P) if with_prior else None
    return numbers.combined, numbers.kept_2T[1], losses


def combine_into(
    numbers: Numbers,
    stats_RFT: Tensor,
    headers_RH: Tensor | None,
    target: Tensor,
    call: LossCall,
    with_prior: bool,
    states: States | None = None,
) -> None:
    """Write what `combine` returns, of some tokens. `with_prior`: the statistics have Σ u_v z_v."""
    count, options = len(target), call.options
    if count == 0:
        return
    header = headers_RH if headers_RH is not None else target  # any tensor: it is not read
    given = states or States(numbers.loss_T, numbers.loss_T, 0.0)  # neither
    with on_device(stats_RFT):
        triton_kernels.combine_kernel[(cdiv(count, numbers.block),)](
            stats_RFT,
            *stats_RFT.stride()[:2],
            header,
            header.view(torch.float64),
            target.contiguous(),
            given.hidden_TH,
            given.hidden_TH.stride(0),
            given.mean_row_H,
            given.scale,
            numbers.kept_2T,
            numbers.seen_4T,
            numbers.loss_T,
            numbers.partial_3P,
            count,
            numbers.kept_2T.stride(0),
            numbers.partial_3P.stride(0),
            call.shard.vocab_size,
            options.ignore_index,
            given.mean_row_H.shape[0],
            1 - options.label_smoothing,
            options.label_smoothing,
            options.z_loss,
            RANKS=len(stats_RFT),
            HEADER=agreement.HEADER_FIELDS,
            START=agreement.OFFSET["start"],
            MASS=agreement.OFFSET["prior_mass"],
            WITH_FIELD=with_prior,
            WITH_STATES=states is not None,
            BLOCK=numbers.block,
            BLOCK_H=HIDDEN_BLOCK,
            **COMPILER_OPTIONS,
        )


def reduce(losses: Losses, call: LossCall, items: int | Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The loss, and what it was divided by. See `torch_ops`. A label that is none ends in an assertion there."""
    loss, divisor = sum_up(losses, call, items)
    return (losses.loss_T, None) if call.options.reduction == "none" else (loss, divisor)


def sum_up(
    losses: Losses,
    call: LossCall,
    items: int | Tensor | None,
    expected: int | None = None,
    found: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over tokens, divided, and the divisor, `[]` each; asserts labels, and that as many as `expected` are there.

    `found`: how many there are of all tokens, if that was counted before.
    """
    assert losses.partial_3P is not None
    device = losses.loss_T.device
    loss, divisor, fine = (torch.empty((), dtype=torch.float32, device=device) for _ in range(3))
    kind, number, tensor = items_of(call, items, device)
    with on_device(losses.loss_T):
        triton_kernels.sum_kernel[(1,)](
            losses.partial_3P,
            losses.partial_3P.stride(0),
            losses.partial_3P.shape[1],
            loss if tensor is None else tensor,
            number,
            loss if found is None else found,
            expected or 0,
            loss,
            divisor,
            fine,
            ITEMS=kind,
            EXPECTED=expected is not None,
            FOUND=found is not None,
            BLOCK=SUM_BLOCK,
            **COMPILER_OPTIONS,
        )
    torch._assert_async(fine)
    return loss, divisor


def items_of(call: LossCall, items: int | Tensor | None, device: torch.device) -> tuple[str, float, Tensor | None]:
    """What a kernel divides by: "count" (labels, counted there), "number" with that, or "tensor" with one there."""
    if call.options.reduction != "mean":
        return "number", 1.0, None
    if items is None:
        return "count", 1.0, None
    if isinstance(items, Tensor):
        return "tensor", 1.0, items.reshape(()).to(device)
    return "number", float(items), None


def gradient(
    logits_TS: Tensor,
    target: Tensor,
    call: LossCall,
    base_T: Tensor,
    scale_T: Tensor,
    weight_T: Tensor,
    out_TS: Tensor,
    with_prior: bool = True,
    divisor: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits into `out_TS`, maybe their memory: one read, one write. See `torch_ops`."""
    options, (count, width) = call.options, out_TS.shape
    if count == 0 or width == 0:
        return out_TS
    block, narrowed = _block(width), out_TS.element_size() < logits_TS.element_size()
    blocks = 1 if narrowed else cdiv(width, block)
    with on_device(logits_TS):
        triton_kernels.gradient_kernel[(count * blocks,)](
            logits_TS,
            *logits_TS.stride(),
            out_TS,
            *out_TS.stride(),
            target.contiguous(),
            _prior(call, logits_TS),
            base_T,
            scale_T,
            weight_T,
            weight_T.stride(0) if weight_T.dim() else 0,  # 0 for one number
            weight_T if divisor is None else divisor,
            blocks,
            call.shard.start,
            call.shard.real_size,
            width,
            options.ignore_index,
            1 - options.label_smoothing,
            options.label_smoothing if call.prior is not None else options.label_smoothing / call.shard.vocab_size,
            options.logit_softcap or 1.0,
            CAPPED=options.logit_softcap is not None,
            SMOOTHED=with_prior and options.label_smoothing > 0,
            UNIFORM=call.prior is None,
            DIVIDED=divisor is not None,
            NARROWED=narrowed,
            BLOCK=block,
            **COMPILER_OPTIONS,
        )
    return out_TS


def scale(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply gradients in contiguous memory by one number, two a launch; by 1 nothing is read, no host waits."""
    full = [gradient for gradient in gradients if gradient.numel()]
    for first, *more in (full[at : at + 2] for at in range(0, len(full), 2)):
        second, count = (more[0], more[0].numel()) if more else (first, 0)
        blocks = cdiv(first.numel(), SCALE_BLOCK)
        with on_device(first):
            triton_kernels.scale_kernel[(blocks + cdiv(count, SCALE_BLOCK),)](
                first, first.numel(), blocks, second, count, factor, BLOCK=SCALE_BLOCK, **COMPILER_OPTIONS
            )


def on_device(given: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever device its arguments lie on."""
    index = given.get_device()  # -1 on the CPU
    return _NOTHING if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


def _prior(call: LossCall, logits_TS: Tensor) -> Tensor:
    """The prior as a kernel reads it; for a uniform one any tensor, which is not read."""
    return logits_TS if call.prior is None else call.prior.contiguous()


def _block(width: int) -> int:
    return min(BLOCK, 1 << (max(width, 16) - 1).bit_length())


def cdiv(count: int, block: int) -> int:
    """Return how many blocks hold so many; Triton's own takes longer."""
    return -(-count // block)
