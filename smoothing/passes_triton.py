"""The two passes over a shard's logits as Triton kernels: one read for statistics, one read and write for gradients.

What is between them, a few numbers a token, is one kernel more: dozens of launches would take as long as a pass.

Whatever floating dtype and strides the logits have, arithmetic is fp32 and no fp32 copy is made. Rows without a label
are not read, padding columns neither. `passes` says when these run, `passes_torch` what they compute. With
`TRITON_INTERPRET=1` they run on the CPU, slowly.

An H100 reads bf16 logits at 3 TB/s only if a kernel spends fewer than 19 instructions an element (38 where it
writes them too): hence columns are masked in a row's last block alone, and tiny exponentials are flushed to zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from smoothing import agreement
from smoothing.call import LossCall
from smoothing.passes import interpreted
from smoothing.shard_statistics import Combined, ShardStatistics

BLOCK = 4096  # columns of a row looked at together
SCALED = 16384  # elements of a gradient that a program scales
COMBINED = 128  # tokens whose statistics a program adds up
INTERPRETED = tl.constexpr(interpreted())
COMPILER_OPTIONS = {
    "enable_fp_fusion": True
}  # a product and a sum in one instruction; Triton 3.10 will not by itself


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
        with _current(logits_TS):
            _statistics_kernel[(count,)](
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
                SMOOTHED=with_prior and options.label_smoothing > 0,
                WITH_FIELD=with_prior,
                UNIFORM=call.prior is None,
                BLOCK=_block(real_size),
                **COMPILER_OPTIONS,
            )
    return ShardStatistics(*stats_FT.unbind(), *([] if with_prior else [None]))


def combine(
    stats_RFT: Tensor, headers_RH: Tensor | None, target: Tensor, call: LossCall, with_prior: bool = True
) -> tuple[Combined, Tensor, Tensor | None]:
    """All ranks' statistics added up, their softmax scale, and the losses. See `passes_torch`."""
    count, options = len(target), call.options
    rows_7T = torch.empty(7, count, dtype=torch.float32, device=stats_RFT.device)
    if count:
        header = headers_RH if headers_RH is not None else target  # any tensor will do, since none is read
        with _current(stats_RFT):
            _combine_kernel[(triton.cdiv(count, COMBINED),)](
                stats_RFT,
                *stats_RFT.stride()[:2],
                header,
                header.view(torch.float64),
                target.contiguous(),
                rows_7T,
                count,
                call.shard.vocab_size,
                options.ignore_index,
                1 - options.label_smoothing,
                options.label_smoothing,
                options.z_loss,
                RANKS=len(stats_RFT),
                HEADER=agreement.HEADER_FIELDS,
                START=agreement.START,
                MASS=agreement.PRIOR_MASS,
                WITH_FIELD=with_prior,
                BLOCK=COMBINED,
                **COMPILER_OPTIONS,
            )
    *fields, scale_T, loss_T = rows_7T.unbind()
    return Combined(*fields), scale_T, loss_T if with_prior else None


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
    """The gradient of the logits into `out_TS`, maybe their memory: one read, one write. See `passes_torch`."""
    options, (count, width) = call.options, out_TS.shape
    if count == 0 or width == 0:
        return out_TS
    with _current(logits_TS):
        _gradient_kernel[(count,)](
            logits_TS,
            *logits_TS.stride(),
            out_TS,
            *out_TS.stride(),
            target.contiguous(),
            _prior(call, logits_TS),
            base_T,
            scale_T,
            weight_T,
            weight_T.stride(0),  # 0 where it is one number, expanded
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
            NARROWED=out_TS.element_size() < logits_TS.element_size(),
            BLOCK=_block(width),
            **COMPILER_OPTIONS,
        )
    return out_TS


def scale(gradient: Tensor, factor: Tensor) -> None:
    """`gradient *= factor`, one number, in contiguous memory; where that is 1 nothing is read, and nobody waits."""
    if count := gradient.numel():
        with _current(gradient):
            _scale_kernel[(triton.cdiv(count, SCALED),)](gradient, factor, count, BLOCK=SCALED, **COMPILER_OPTIONS)


def _current(logits_TS: Tensor) -> torch.cuda.device:
    """Triton launches on the current device, whatever device its arguments lie on."""
    return torch.cuda.device(logits_TS.get_device())  # -1 on the CPU, where nothing is done


def _prior(call: LossCall, logits_TS: Tensor) -> Tensor:
    """The prior as a kernel reads it; where it is uniform any tensor will do, since none is read."""
    return logits_TS if call.prior is None else call.prior.contiguous()


def _block(width: int) -> int:
    return min(BLOCK, triton.next_power_of_2(max(width, 16)))


@triton.jit
def _exp(x):
    """`exp(x)`, 0 below 1.2e-38: two instructions where `tl.exp` takes five. Triton's interpreter has only that."""
    return tl.exp(x) if INTERPRETED else libdevice.fast_expf(x)


@triton.jit
def _capped(z, cap):
    """`cap·tanh(z / cap)`; a series where the quotient of exponentials would cancel."""
    x = z / cap
    e = _exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, e - 1.0, 1.0 - e) / (1.0 + e)
    x2 = x * x
    near = x * (1.0 - x2 * (1.0 / 3 - x2 * (2.0 / 15 - x2 * (17.0 / 315))))
    return cap * tl.where(tl.abs(x) < 0.125, near, far)


@triton.jit
def _read_block(row_logits, column_stride, column, inside, cap, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """A block of a row's logits in fp32, capped if so asked; -inf outside."""
    place = row_logits + column.to(tl.int64) * column_stride
    z = tl.load(place, mask=inside, other=float("-inf")) if MASKED else tl.load(place)
    z = z.to(tl.float32)
    if CAPPED:
        z = _capped(z, cap)
        if MASKED:
            z = tl.where(inside, z, float("-inf"))
    return z


@triton.jit
def _read_prior(priors, column, inside, MASKED: tl.constexpr):
    """A block of the prior; 0 outside."""
    return tl.load(priors + column, mask=inside, other=0.0) if MASKED else tl.load(priors + column)


@triton.jit
def _add_block(
    row_logits,
    column_stride,
    priors,
    first,
    real_size,
    uniform,
    cap,
    maximum,
    sum_exp,
    weighted,
    mass,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    UNIFORM: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row's statistics with a block more: relative to the largest logit so far, and moved when that grows."""
    column = first + tl.arange(0, BLOCK)
    inside = column < real_size
    z = _read_block(row_logits, column_stride, column, inside, cap, CAPPED, MASKED)
    larger = tl.maximum(maximum, tl.max(z, 0))
    # where all are -inf there is no maximum to be relative to
    base = tl.where(larger == float("-inf"), 0.0, larger)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum - base)
    relative = z - base
    sum_exp = sum_exp * _exp(shift) + tl.sum(_exp(relative), 0)
    if SMOOTHED:
        weighted += mass * shift
        if UNIFORM:
            if MASKED:
                relative = tl.where(inside, relative, 0.0)
                mass += uniform * (real_size - first)
            else:
                mass += uniform * BLOCK
            weighted += uniform * tl.sum(relative, 0)
        else:
            u = _read_prior(priors, column, inside, MASKED)
            weighted += tl.sum(tl.where(u != 0, u * relative, 0.0), 0)
            mass += tl.sum(u, 0)
    return larger, sum_exp, weighted, mass


@triton.jit(do_not_specialize=["count", "start", "ignore_index"])
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
    uniform,
    ignore_index,
    cap,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    WITH_FIELD: tl.constexpr,
    UNIFORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * row_stride
    target = tl.load(targets + row)
    # a row that is left out keeps its statistics finite all the way: maximum 0, sum of exponentials 1
    maximum, sum_exp, label, weighted, mass = 0.0, 1.0, 0.0, 0.0, 0.0
    if target != ignore_index:
        maximum, sum_exp = float("-inf"), 0.0
        whole = real_size // BLOCK * BLOCK
        for first in range(0, whole, BLOCK):
            maximum, sum_exp, weighted, mass = _add_block(
                row_logits, column_stride, priors, first, real_size, uniform, cap,
                maximum, sum_exp, weighted, mass, CAPPED, SMOOTHED, UNIFORM, False, BLOCK,
            )  # fmt: skip
        if whole < real_size:
            maximum, sum_exp, weighted, mass = _add_block(
                row_logits, column_stride, priors, whole, real_size, uniform, cap,
                maximum, sum_exp, weighted, mass, CAPPED, SMOOTHED, UNIFORM, True, BLOCK,
            )  # fmt: skip
        at = target - start
        if (at >= 0) & (at < real_size):
            z_y = tl.load(row_logits + at * column_stride).to(tl.float32)
            if CAPPED:
                z_y = _capped(z_y, cap)
            label = z_y - tl.where(maximum == float("-inf"), 0.0, maximum)
    tl.store(stats + row, maximum)
    tl.store(stats + count + row, sum_exp)
    tl.store(stats + 2 * count + row, label)
    if WITH_FIELD:
        tl.store(stats + 3 * count + row, weighted)


@triton.jit(do_not_specialize=["count", "vocab_size", "ignore_index"])
def _combine_kernel(
    stats,
    rank_stride,
    field_stride,
    headers,
    header_floats,
    targets,
    rows,
    count,
    vocab_size,
    ignore_index,
    label_share,
    smoothing,
    z_loss,
    RANKS: tl.constexpr,
    HEADER: tl.constexpr,
    START: tl.constexpr,
    MASS: tl.constexpr,
    WITH_FIELD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block of tokens, which looks at the ranks twice: the largest maximum must be known first."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < count
    target = tl.load(targets + token, mask=inside, other=ignore_index)
    inside_vocabulary = tl.minimum(tl.maximum(target, 0), vocab_size - 1)
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    for rank in range(RANKS):
        maximum = tl.maximum(maximum, tl.load(stats + rank * rank_stride + token, mask=inside, other=0.0))
    nothing = tl.zeros([BLOCK], tl.float32)
    sum_exp, label, prior = nothing, nothing, nothing
    for rank in range(RANKS):
        own = stats + rank * rank_stride + token
        shift = tl.load(own, mask=inside, other=0.0) - maximum
        sum_exp += tl.load(own + field_stride, mask=inside, other=1.0) * tl.exp(shift)
        start, mass = 0, 1.0
        if RANKS > 1:
            start = tl.load(headers + rank * HEADER + START)
            mass = tl.load(header_floats + rank * HEADER + MASS).to(tl.float32)
        # of the ranks that start at the label or before, the last one holds it
        label = tl.where(start <= inside_vocabulary, tl.load(own + 2 * field_stride, mask=inside) + shift, label)
        if WITH_FIELD:
            # a shard without mass may have a shift of -inf: 0·inf is not 0
            moved = tl.where(mass != 0, mass * shift, 0.0)
            prior += tl.load(own + 3 * field_stride, mask=inside, other=0.0) + moved
    log_sum_exp = tl.log(sum_exp)
    lse = maximum + log_sum_exp
    # of what has no share, -inf is left out too
    loss = log_sum_exp - tl.where(label_share > 0, label_share * label, 0.0)
    loss -= tl.where(smoothing > 0, smoothing * prior, 0.0)
    loss += z_loss * lse * lse
    scale = (1.0 + 2.0 * z_loss * lse) / sum_exp
    row = rows + token
    tl.store(row, maximum, mask=inside)
    tl.store(row + count, log_sum_exp, mask=inside)
    tl.store(row + 2 * count, label, mask=inside)
    tl.store(row + 3 * count, prior, mask=inside)
    tl.store(row + 4 * count, tl.full([BLOCK], 1.0, tl.float32), mask=inside)
    tl.store(row + 5 * count, scale, mask=inside)
    tl.store(row + 6 * count, tl.where(target != ignore_index, loss, 0.0), mask=inside)


@triton.jit
def _write_block(
    row_logits,
    column_stride,
    row_out,
    out_column_stride,
    priors,
    first,
    real_size,
    width,
    at,
    base,
    scale,
    weight,
    label_share,
    prior_share,
    cap,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    UNIFORM: tl.constexpr,
    NARROWED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradient of one block of a row."""
    column = first + tl.arange(0, BLOCK)
    inside = column < real_size
    z = _read_block(row_logits, column_stride, column, inside, cap, CAPPED, MASKED)
    gradient = _exp(z - base) * scale
    gradient -= tl.where(column == at, label_share, 0.0)
    if SMOOTHED:
        if UNIFORM:
            gradient -= prior_share
        else:
            gradient -= prior_share * _read_prior(priors, column, inside, MASKED)
    if CAPPED:
        gradient *= 1.0 - (z / cap) * (z / cap)
    gradient *= weight
    if NARROWED:
        tl.debug_barrier()  # what is written lies where other threads may still have to read this block
    place = row_out + column.to(tl.int64) * out_column_stride
    if MASKED:
        gradient = tl.where(inside, gradient, 0.0)
        tl.store(place, gradient.to(row_out.dtype.element_ty), mask=column < width)
    else:
        tl.store(place, gradient.to(row_out.dtype.element_ty))


@triton.jit(do_not_specialize=["start", "ignore_index", "weight_stride"])
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
    weight_stride,
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
    NARROWED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row, from its front: what a block writes, in a narrower dtype too, overtakes no block unread."""
    row = tl.program_id(0).to(tl.int64)
    row_logits, row_out = logits + row * row_stride, out + row * out_row_stride
    target = tl.load(targets + row)
    if target == ignore_index:
        for first in range(0, width, BLOCK):
            column = first + tl.arange(0, BLOCK)
            place = row_out + column.to(tl.int64) * out_column_stride
            tl.store(place, tl.zeros([BLOCK], dtype=out.dtype.element_ty), mask=column < width)
    else:
        at = (target - start).to(tl.int32)
        base, scale, weight = tl.load(bases + row), tl.load(scales + row), tl.load(weights + row * weight_stride)
        whole = real_size // BLOCK * BLOCK
        for first in range(0, whole, BLOCK):
            _write_block(
                row_logits, column_stride, row_out, out_column_stride, priors, first, real_size, width, at, base,
                scale, weight, label_share, prior_share, cap, CAPPED, SMOOTHED, UNIFORM, NARROWED, False, BLOCK,
            )  # fmt: skip
        for first in range(whole, width, BLOCK):
            _write_block(
                row_logits, column_stride, row_out, out_column_stride, priors, first, real_size, width, at, base,
                scale, weight, label_share, prior_share, cap, CAPPED, SMOOTHED, UNIFORM, NARROWED, True, BLOCK,
            )  # fmt: skip


@triton.jit
def _scale_kernel(gradient, factor, count, BLOCK: tl.constexpr):
    """One program a block of elements."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(gradient + at, mask=at < count)
        tl.store(gradient + at, (x.to(tl.float32) * by).to(gradient.dtype.element_ty), mask=at < count)
