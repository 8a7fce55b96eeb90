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
    WITH_STATS: tl.constexpr,
    SMOOTHED: tl.constexpr,
    WITH_FIELD: tl.constexpr,
    UNIFORM: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * row_stride
    target = tl.load(targets + row)
    # a row that is left out keeps its statistics finite all the way: maximum 0, sum of exponentials 1
    maximum, sum_exp, label, weighted, mass = 0.0, 1.0, 0.0, 0.0, 0.0
    if target != ignore_index:
        at = target - start
        maximum, sum_exp, before = float("-inf"), 0.0, float("-inf")
        whole = real_size // BLOCK * BLOCK
        for first in range(0, whole, BLOCK):
            maximum, sum_exp, weighted, mass = _add_block(
                row_logits, column_stride, priors, first, real_size, uniform, cap,
                maximum, sum_exp, weighted, mass, CAPPED, SMOOTHED, UNIFORM, False, BLOCK,
            )  # fmt: skip
            if WITH_STATS:  # the largest of the blocks that end before the label
                before = tl.where(first + BLOCK <= at, maximum, before)
        if whole < real_size:
            maximum, sum_exp, weighted, mass = _add_block(
                row_logits, column_stride, priors, whole, real_size, uniform, cap,
                maximum, sum_exp, weighted, mass, CAPPED, SMOOTHED, UNIFORM, True, BLOCK,
            )  # fmt: skip
        if (at >= 0) & (at < real_size):
            z_y = tl.load(row_logits + at * column_stride).to(tl.float32)
            if CAPPED:
                z_y = _capped(z_y, cap)
            label = z_y - tl.where(maximum == float("-inf"), 0.0, maximum)
            if WITH_STATS:  # noqa: SIM102 (known when compiled, as the other is not)
                if label == 0.0:  # -0.0 if an earlier column is as large: see `smoothing.core.statistics`
                    for piece in range(at // BLOCK * BLOCK, at, PIECE):
                        column = piece + tl.arange(0, PIECE)
                        z = _read_block(row_logits, column_stride, column, column < at, cap, CAPPED, True)
                        before = tl.maximum(before, tl.max(z, 0))
                    label *= tl.where(before == maximum, -1.0, 1.0)  # Triton 3.7 takes a constant -0.0 for 0.0
    tl.store(stats + row, maximum)
    tl.store(stats + count + row, sum_exp)
    tl.store(stats + 2 * count + row, label)
    if WITH_FIELD:
        tl.store(stats + 3 * count + row, weighted)


@triton.jit
def _dot(rows, row, inside, mean_row, width, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr):
    """A product of each of these rows with one vector, `[BLOCK]`."""
    products = tl.zeros([BLOCK, BLOCK_H], tl.float32)
    for first in range(0, width, BLOCK_H):
        column = first + tl.arange(0, BLOCK_H)
        within = column < width
        h = tl.load(rows + row[:, None] + column[None, :], mask=inside[:, None] & within[None, :], other=0.0)
        products += h.to(tl.float32) * tl.load(mean_row + column, mask=within, other=0.0)[None, :]
    return tl.sum(products, 1)


@triton.jit(
    do_not_specialize=[
        "rank_stride", "field_stride", "count", "apart", "partials_apart", "vocab_size", "ignore_index",
    ]
)  # fmt: skip
def combine_kernel(
    stats,
    rank_stride,
    field_stride,
    headers,
    header_floats,
    targets,
    states,
    state_stride,
    mean_row,
    mean_scale,
    kept,
    seen,
    losses,
    partials,
    count,
    apart,
    partials_apart,
    vocab_size,
    ignore_index,
    width,
    label_share,
    smoothing,
    z_loss,
    RANKS: tl.constexpr,
    HEADER: tl.constexpr,
    START: tl.constexpr,
    MASS: tl.constexpr,
    WITH_FIELD: tl.constexpr,
    WITH_STATES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program a block of tokens, which looks at the ranks twice: the largest maximum must be known first.

    Σ u_v z_v comes from the statistics (WITH_FIELD), or is `mean_scale·h·mean_row` of the hidden states
    (WITH_STATES). `apart` is from one field of what is written to the next.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < count
    target = tl.load(targets + token, mask=inside, other=ignore_index)
    inside_vocabulary = tl.minimum(tl.maximum(target, 0), vocab_size - 1)
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    for rank in range(RANKS):
        maximum = tl.maximum(maximum, tl.load(stats + rank * rank_stride + token, mask=inside, other=0.0))
    nothing = tl.zeros([BLOCK], tl.float32)
    sum_exp, label, prior = nothing, nothing, nothing
    attained = tl.zeros([BLOCK], tl.int1)  # the maximum, by a rank before
    beaten = attained
    for rank in range(RANKS):
        own = stats + rank * rank_stride + token
        shift = tl.load(own, mask=inside, other=0.0) - maximum
        sum_exp += tl.load(own + field_stride, mask=inside, other=1.0) * tl.exp(shift)
        start, mass = 0, 1.0
        if RANKS > 1:
            start = tl.load(headers + rank * HEADER + START)
            mass = tl.load(header_floats + rank * HEADER + MASS).to(tl.float32)
        # of the ranks that start at the label or before, the last one holds it
        holds = start <= inside_vocabulary
        own_label = tl.load(own + 2 * field_stride, mask=inside)
        label = tl.where(holds, tl.where(shift == 0, own_label, own_label + shift), label)  # -0.0 keeps its sign
        beaten = tl.where(holds, attained, beaten)
        attained = attained | (shift == 0)
        if WITH_FIELD:
            # a shard without mass may have a shift of -inf: 0·inf is not 0
            moved = tl.where(mass != 0, mass * shift, 0.0)
            prior += tl.load(own + 3 * field_stride, mask=inside, other=0.0) + moved
    label = tl.where(beaten & (label == 0), tl.abs(label) * -1.0, label)  # -0.0
    if WITH_STATES:
        row = token.to(tl.int64) * state_stride
        prior = mean_scale * _dot(states, row, inside, mean_row, width, BLOCK, BLOCK_H) - maximum
    log_sum_exp = tl.log(sum_exp)
    lse = maximum + log_sum_exp
    # of what has no share, -inf is left out too
    loss = log_sum_exp - tl.where(label_share > 0, label_share * label, 0.0)
    loss -= tl.where(smoothing > 0, smoothing * prior, 0.0)
    loss += z_loss * lse * lse
    scale = (1.0 + 2.0 * z_loss * lse) / sum_exp
    tl.store(kept + token, maximum, mask=inside)
    tl.store(kept + apart + token, scale, mask=inside)
    tl.store(seen + token, log_sum_exp, mask=inside)
    tl.store(seen + apart + token, label, mask=inside)
    tl.store(seen + 2 * apart + token, prior, mask=inside)
    tl.store(seen + 3 * apart + token, tl.full([BLOCK], 1.0, tl.float32), mask=inside)  # the label's mass
    labelled = target != ignore_index  # outside there is none
    loss = tl.where(labelled, loss, 0.0)
    tl.store(losses + token, loss, mask=inside)
    own_partials = partials + tl.program_id(0)
    tl.store(own_partials, tl.sum(loss, 0))
    tl.store(own_partials + partials_apart, tl.sum(labelled.to(tl.float32), 0))
    wrong = labelled & (target != inside_vocabulary)
    tl.store(own_partials + 2 * partials_apart, tl.sum(wrong.to(tl.float32), 0))


@triton.jit
def read_divisor(items, number, count, ITEMS: tl.constexpr):
    """What a sum of losses is divided by, at least 1: the labels counted, a number, or one on the device."""
    divisor = count
    if ITEMS == "number":
        divisor = number
    if ITEMS == "tensor":
        divisor = tl.load(items).to(tl.float32)
    return tl.maximum(divisor, 1.0)


@triton.jit(do_not_specialize=["partials_apart", "programs", "expected"])
def sum_kernel(
    partials,
    partials_apart,
    programs,
    items,
    number,
    found,
    expected,
    loss,
    divisor,
    fine,
    ITEMS: tl.constexpr,
    EXPECTED: tl.constexpr,
    FOUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program, which adds up what those of `combine_kernel` left: always in the same order, to the same bits.

    `fine` is 0 if a label was none, or if there are not as many as expected.
    """
    total, count, wrong = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, programs, BLOCK):
        program = first + tl.arange(0, BLOCK)
        inside = program < programs
        total += tl.load(partials + program, mask=inside, other=0.0)
        count += tl.load(partials + partials_apart + program, mask=inside, other=0.0)
        wrong += tl.load(partials + 2 * partials_apart + program, mask=inside, other=0.0)
    labels = tl.sum(count, 0)
    by = read_divisor(items, number, labels, ITEMS)
    tl.store(loss, tl.sum(total, 0) / by)
    tl.store(divisor, by)
    good = tl.sum(wrong, 0) == 0.0
    if EXPECTED:
        good = good & (labels == expected)
    if FOUND:
        good = good & (tl.load(found) == expected)
    tl.store(fine, good.to(tl.float32))


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
    divisor,
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
    DIVIDED: tl.constexpr,
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
        if DIVIDED:
            weight /= tl.load(divisor)
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
def _scale_block(gradient, block, by, count, BLOCK: tl.constexpr):
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(gradient + at, mask=at < count)
    tl.store(gradient + at, (x.to(tl.float32) * by).to(gradient.dtype.element_ty), mask=at < count)


@triton.jit(do_not_specialize=["blocks"])
def scale_kernel(gradient, count, blocks, second, second_count, factor, BLOCK: tl.constexpr):
    """One program a block of elements: `blocks` of the first gradient, then those of the second."""
    by = tl.load(factor).to(tl.float32)
    block = tl.program_id(0)
    if by != 1.0:
        if block < blocks:
            _scale_block(gradient, block, by, count, BLOCK)
        else:
            _scale_block(second, block - blocks, by, second_count, BLOCK)
