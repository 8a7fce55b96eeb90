"""The two passes over a shard's logits as Triton kernels: one read for statistics, one read and write for gradients.

Whatever floating dtype and strides the logits have, arithmetic is fp32 and no fp32 copy is made. Rows without a label
are not read, padding columns neither. `passes` says when these run, `passes_torch` what they compute. With
`TRITON_INTERPRET=1` they run on the CPU, slowly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from smoothing.call import LossCall
from smoothing.shard_statistics import ShardStatistics

BLOCK = 4096  # columns of a row looked at together


def statistics(logits_TS: Tensor, target: Tensor, call: LossCall, with_prior: bool = True) -> ShardStatistics:
    """This rank's statistics, `[T]` each: one read. `with_prior=False`: Σ u_v z_v is not taken."""
    count, fields = len(target), 4 if with_prior else 3
    options, real_size = call.options, call.shard.real_size
    stats_FT = torch.empty(fields, count, dtype=torch.float32, device=logits_TS.device)
    if real_size == 0:
        return ShardStatistics.nothing(
            count, soft=False, prior=with_prior, dtype=torch.float32, device=logits_TS.device
        )
    if count:
        _statistics_kernel[(count,)](
            logits_TS,
            *logits_TS.stride(),
            target.contiguous(),
            _prior(call, logits_TS),
            stats_FT,
            count,
            call.shard.start,
            real_size,
            call.shard.vocab_size,
            options.ignore_index,
            options.logit_softcap or 1.0,
            CAPPED=options.logit_softcap is not None,
            SMOOTHED=with_prior and options.label_smoothing > 0,
            WITH_FIELD=with_prior,
            UNIFORM=call.prior is None,
            BLOCK=_block(real_size),
        )
    return ShardStatistics(*stats_FT.unbind(), *([] if with_prior else [None]))


def gradient(
    logits_TS: Tensor,
    target: Tensor,
    call: LossCall,
    base_T: Tensor,
    scale_T: Tensor,
    weight_T: Tensor,
    out_TS: Tensor,
    with_prior: bool = True,
) -> Tensor:
    """The gradient of the logits into `out_TS`, which may be the logits: one read, one write. See `passes_torch`."""
    options, (count, width) = call.options, out_TS.shape
    if count == 0 or width == 0:
        return out_TS
    block = _block(width)
    _gradient_kernel[(count, triton.cdiv(width, block))](
        logits_TS,
        *logits_TS.stride(),
        out_TS,
        *out_TS.stride(),
        target.contiguous(),
        _prior(call, logits_TS),
        base_T,
        scale_T,
        weight_T.contiguous(),  # an upstream gradient may be one number, expanded
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
        BLOCK=block,
    )
    return out_TS


def _prior(call: LossCall, logits_TS: Tensor) -> Tensor:
    """The prior as a kernel reads it; where it is uniform any tensor will do, since none is read."""
    return logits_TS if call.prior is None else call.prior.contiguous()


def _block(width: int) -> int:
    return min(BLOCK, triton.next_power_of_2(max(width, 16)))


@triton.jit
def _capped(z, cap):
    """`cap·tanh(z / cap)`; a series where the quotient of exponentials would cancel."""
    x = z / cap
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)
    x2 = x * x
    near = x * (1.0 - x2 * (1.0 / 3 - x2 * (2.0 / 15 - x2 * (17.0 / 315))))
    return cap * tl.where(tl.abs(x) < 0.125, near, far)


@triton.jit
def _statistics_kernel(
    logits,
    row_stride,
    column_stride,
    targets,
    priors,
    stats,
    count,
    start,
    real_size,
    vocab_size,
    ignore_index,
    cap,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    WITH_FIELD: tl.constexpr,
    UNIFORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row. What is summed is kept relative to the largest logit so far, and moved when that grows."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    # a row that is left out keeps its statistics finite all the way: maximum 0, sum of exponentials 1
    maximum, sum_exp, label, weighted, mass = 0.0, 1.0, 0.0, 0.0, 0.0
    if target != ignore_index:
        maximum, sum_exp = float("-inf"), 0.0
        for first in range(0, real_size, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < real_size
            place = logits + row * row_stride + column.to(tl.int64) * column_stride
            z = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
            if CAPPED:
                z = tl.where(inside, _capped(z, cap), float("-inf"))
            larger = tl.maximum(maximum, tl.max(z, 0))
            # where all are -inf there is no maximum to be relative to
            before = tl.where(maximum == float("-inf"), 0.0, maximum)
            base = tl.where(larger == float("-inf"), 0.0, larger)
            sum_exp = sum_exp * tl.exp(tl.where(maximum == float("-inf"), 0.0, before - base))
            sum_exp += tl.sum(tl.exp(z - base), 0)
            if SMOOTHED:
                if UNIFORM:
                    u = tl.where(inside, 1.0 / vocab_size, 0.0)
                else:
                    u = tl.load(priors + column, mask=inside, other=0.0)
                weighted += mass * (before - base) + tl.sum(tl.where(u > 0, u * (z - base), 0.0), 0)
                mass += tl.sum(u, 0)
            maximum = larger
        at = target - start
        if (at >= 0) & (at < real_size):
            z_y = tl.load(logits + row * row_stride + at * column_stride).to(tl.float32)
            if CAPPED:
                z_y = _capped(z_y, cap)
            label = z_y - tl.where(maximum == float("-inf"), 0.0, maximum)
    tl.store(stats + row, maximum)
    tl.store(stats + count + row, sum_exp)
    tl.store(stats + 2 * count + row, label)
    if WITH_FIELD:
        tl.store(stats + 3 * count + row, weighted)


@triton.jit
def _gradient_kernel(
    logits,
    row_stride,
    column_stride,
    out,
    out_row_stride,
    out_column_stride,
    targets,
    priors,
    bases,
    scales,
    weights,
    start,
    real_size,
    width,
    ignore_index,
    label_share,
    prior_share,
    cap,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    UNIFORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row and block of columns; each element is read before the same program writes it."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    written = column < width
    place = out + row * out_row_stride + column.to(tl.int64) * out_column_stride
    target = tl.load(targets + row)
    if target == ignore_index:
        tl.store(place, tl.zeros([BLOCK], dtype=tl.float32).to(out.dtype.element_ty), mask=written)
    else:
        inside = column < real_size
        read = logits + row * row_stride + column.to(tl.int64) * column_stride
        z = tl.load(read, mask=inside, other=float("-inf")).to(tl.float32)
        if CAPPED:
            z = _capped(z, cap)
        gradient = tl.exp(z - tl.load(bases + row)) * tl.load(scales + row)
        gradient -= tl.where(column == target - start, label_share, 0.0)
        if SMOOTHED:
            if UNIFORM:
                gradient -= prior_share
            else:
                gradient -= prior_share * tl.load(priors + column, mask=inside, other=0.0)
        if CAPPED:
            gradient *= 1.0 - (z / cap) * (z / cap)
        gradient = tl.where(inside, gradient * tl.load(weights + row), 0.0)
        tl.store(place, gradient.to(out.dtype.element_ty), mask=written)
