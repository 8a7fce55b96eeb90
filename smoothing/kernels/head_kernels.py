"""The Triton kernels of `head_ops`: what is around the products of the fused head, where these are in bf16.

Legend of names: `states` hidden states of the labelled tokens; `share` what a token's loss is scaled by, 1 / divisor.
"""

# Triton reads these functions itself, and gives their arguments types of its own.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

import triton
import triton.language as tl

from smoothing.kernels.triton_kernels import INTERPRETED, read_divisor

PARTS = tl.constexpr(3)  # a sum of hidden states as so many bf16 numbers: 24 bits


@triton.jit
def _rounded(x):
    """The nearest bf16 number, in fp32. Triton's interpreter would cut the other bits off instead."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit(do_not_specialize=["total", "count", "ignore_index"])
def labelled_kernel(targets, rows, labels, positions, found, total, count, ignore_index, BLOCK: tl.constexpr):
    """One program: the tokens that have a label, in order, `count` of them; and where each of all tokens went, or -1.

    What is left of `count` where there are fewer gets no label; `found` is how many there are.
    """
    before = 0
    for first in range(0, total, BLOCK):
        token = first + tl.arange(0, BLOCK)
        inside = token < total
        target = tl.load(targets + token, mask=inside, other=ignore_index)
        valid = inside & (target != ignore_index)
        order = before + tl.cumsum(valid.to(tl.int32), 0) - 1
        kept = valid & (order < count)
        tl.store(rows + order, token.to(tl.int64), mask=kept)
        tl.store(labels + order, target, mask=kept)
        tl.store(positions + token, tl.where(kept, order, -1), mask=inside)
        before += tl.sum(valid.to(tl.int32), 0)
    tl.store(found, before)
    for first in range(before, count, BLOCK):
        order = first + tl.arange(0, BLOCK)
        tl.store(rows + order, tl.zeros([BLOCK], tl.int64), mask=order < count)
        tl.store(labels + order, tl.zeros([BLOCK], tl.int64) + ignore_index, mask=order < count)


@triton.jit(do_not_specialize=["count", "ignore_index"])
def gather_kernel(
    hidden,
    hidden_stride,
    rows,
    targets,
    weights,
    states,
    scaled,
    sums,
    share,
    items,
    number,
    count,
    width,
    ignore_index,
    ITEMS: tl.constexpr,
    SELECTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SUMMED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program a block of tokens and columns: hidden states of labelled tokens, in the products' dtype.

    With WEIGHTED once more, times each token's weight; with SUMMED the last of these, summed over the tokens.
    States of tokens without a label are not read, and become 0.
    """
    columns = tl.cdiv(width, BLOCK_H)
    block = tl.program_id(0) // columns
    column = tl.program_id(0) % columns * BLOCK_H + tl.arange(0, BLOCK_H)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    inside, within = token < count, column < width
    labelled = tl.load(targets + token, mask=inside, other=ignore_index) != ignore_index
    row = tl.load(rows + token, mask=labelled, other=0) if SELECTED else token.to(tl.int64)
    place = row[:, None] * hidden_stride + column[None, :]
    h = tl.load(hidden + place, mask=labelled[:, None] & within[None, :], other=0.0)
    state = _rounded(h.to(tl.float32)).to(states.dtype.element_ty)
    place = token[:, None].to(tl.int64) * width + column[None, :]
    written = inside[:, None] & within[None, :]
    tl.store(states + place, state, mask=written)
    if WEIGHTED:
        weight = tl.load(weights + token, mask=labelled, other=0.0)
        state = _rounded(state.to(tl.float32) * weight[:, None]).to(states.dtype.element_ty)
        tl.store(scaled + place, state, mask=written)
    if SUMMED:
        tl.store(sums + block.to(tl.int64) * width + column, tl.sum(state.to(tl.float32), 0), mask=within)
    if tl.program_id(0) == 0:
        tl.store(share, 1.0 / read_divisor(items, number, 1.0, ITEMS))


@triton.jit(do_not_specialize=["blocks", "further"])
def prior_rows_kernel(
    sums,
    states,
    tile,
    tile_stride,
    priors,
    share,
    smoothing,
    blocks,
    further,
    width,
    real_size,
    UNIFORM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a block of columns: the rows that add `-share·ε·u ⊗ Σ h` to the product of the weight's gradient.

    First Σ h in bf16 parts, under the hidden states; then as many rows -share·ε·u in the tile's dtype, rounded as
    the gradient in the tile is. `further` is how many there are, the rest of them 0.
    """
    state_blocks = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    nothing = tl.zeros([BLOCK], tl.float32)
    if program < state_blocks:
        column = program * BLOCK + tl.arange(0, BLOCK)
        within = column < width
        partial = tl.zeros([BLOCK_T, BLOCK], tl.float32)
        for first in range(0, blocks, BLOCK_T):
            block = first + tl.arange(0, BLOCK_T)
            place = block[:, None].to(tl.int64) * width + column[None, :]
            partial += tl.load(sums + place, mask=(block < blocks)[:, None] & within[None, :], other=0.0)
        left = tl.sum(partial, 0)
        for row in range(0, further):
            part = tl.where(row < PARTS, _rounded(left), nothing)
            tl.store(states + row * width + column, part.to(states.dtype.element_ty), mask=within)
            left -= part
    else:
        column = (program - state_blocks) * BLOCK + tl.arange(0, BLOCK)
        within = column < real_size
        u = nothing + smoothing
        if not UNIFORM:
            u *= tl.load(priors + column, mask=within, other=0.0)
        value = -(tl.load(share) * u)
        for row in range(0, further):
            part = tl.where(row < PARTS, _rounded(value), nothing)
            tl.store(tile + row * tile_stride + column, part.to(tile.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["count", "ignore_index"])
def hidden_gradient_kernel(
    products,
    positions,
    targets,
    weights,
    mean_row,
    share,
    out,
    smoothing,
    count,
    width,
    ignore_index,
    SELECTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program a block of all tokens and columns: `weight·(product - share·ε·w̄)`, 0 for tokens without a label.

    With ROUNDED, `share·ε` is rounded to bf16 as the gradient in the tile is, so that the two can cancel.
    """
    columns = tl.cdiv(width, BLOCK_H)
    column = tl.program_id(0) % columns * BLOCK_H + tl.arange(0, BLOCK_H)
    token = tl.program_id(0) // columns * BLOCK_T + tl.arange(0, BLOCK_T)
    inside, within = token < count, column < width
    position = token
    if SELECTED:
        position = tl.load(positions + token, mask=inside, other=-1)
        labelled = inside & (position >= 0)
    else:
        labelled = tl.load(targets + token, mask=inside, other=ignore_index) != ignore_index
    read = labelled[:, None] & within[None, :]
    x = tl.load(products + position[:, None].to(tl.int64) * width + column[None, :], mask=read, other=0.0)
    if SMOOTHED:
        by = tl.load(share) * smoothing
        if ROUNDED:
            by = _rounded(by)
        x -= by * tl.load(mean_row + column, mask=within, other=0.0)[None, :]
    if WEIGHTED:
        x *= tl.load(weights + position, mask=labelled, other=0.0)[:, None]
    x = tl.where(read, x, 0.0).to(out.dtype.element_ty)
    place = token[:, None].to(tl.int64) * width + column[None, :]
    tl.store(out + place, x, mask=inside[:, None] & within[None, :])
