"""The Triton kernels of `triton_ops`: what a program of each does with a row of logits, or a block of tokens.

Arithmetic is fp32. Rows without a label are not read, padding columns neither. With `TRITON_INTERPRET=1` the kernels
run on the CPU, slowly.

An H100 reads bf16 logits at 3 TB/s only if a kernel spends fewer than 19 instructions an element (38 where it
writes them too): hence columns are masked in a row's last block alone, and tiny exponentials are flushed to zero.
"""

# Triton reads these functions itself, and gives their arguments types of its own.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl
from triton.language.extra import libdevice

from smoothing.kernels.interpreter import interpreted

INTERPRETED = tl.constexpr(interpreted())


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
    """A block of a row's logits in fp32, capped with CAPPED; -inf outside."""
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
def statistics_kernel(
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


@triton.jit(do_not_specialize=["rank_stride", "field_stride", "count", "vocab_size", "ignore_index"])
def combine_kernel(
    stats,
    rank_stride,
    field_stride,
    headers,
    header_floats,
    targets,
    kept,
    seen,
    losses,
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
    tl.store(kept + token, maximum, mask=inside)
    tl.store(kept + count + token, scale, mask=inside)
    tl.store(seen + token, log_sum_exp, mask=inside)
    tl.store(seen + count + token, label, mask=inside)
    tl.store(seen + 2 * count + token, prior, mask=inside)
    tl.store(seen + 3 * count + token, tl.full([BLOCK], 1.0, tl.float32), mask=inside)  # the label's mass
    tl.store(losses + token, tl.where(target != ignore_index, loss, 0.0), mask=inside)


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


@triton.jit(do_not_specialize=["weight_stride", "blocks", "start", "ignore_index"])
def gradient_kernel(
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
    blocks,
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
    """`blocks` programs a row, which take its blocks in turn; one where the gradient is of a narrower dtype.

    That one begins at the front: what it writes of a block overtakes no block that is still to be read.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first, step = tl.program_id(0) % blocks * BLOCK, blocks * BLOCK
    row_logits, row_out = logits + row * row_stride, out + row * out_row_stride
    target = tl.load(targets + row)
    if target == ignore_index:
        while first < width:
            column = first + tl.arange(0, BLOCK)
            place = row_out + column.to(tl.int64) * out_column_stride
            tl.store(place, tl.zeros([BLOCK], dtype=out.dtype.element_ty), mask=column < width)
            first += step
    else:
        at = (target - start).to(tl.int32)
        base, scale, weight = tl.load(bases + row), tl.load(scales + row), tl.load(weights + row * weight_stride)
        while first + BLOCK <= real_size:
            _write_block(
                row_logits, column_stride, row_out, out_column_stride, priors, first, real_size, width, at, base,
                scale, weight, label_share, prior_share, cap, CAPPED, SMOOTHED, UNIFORM, NARROWED, False, BLOCK,
            )  # fmt: skip
            first += step
        while first < width:
            _write_block(
                row_logits, column_stride, row_out, out_column_stride, priors, first, real_size, width, at, base,
                scale, weight, label_share, prior_share, cap, CAPPED, SMOOTHED, UNIFORM, NARROWED, True, BLOCK,
            )  # fmt: skip
            first += step


@triton.jit
def scale_kernel(gradient, factor, count, BLOCK: tl.constexpr):
    """One program a block of elements."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(gradient + at, mask=at < count)
        tl.store(gradient + at, (x.to(tl.float32) * by).to(gradient.dtype.element_ty), mask=at < count)
