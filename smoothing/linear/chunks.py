"""How many tokens go through the head at a time: integers.

The widest shard's logits fit the budget, so every rank makes the same chunks whatever its own shard.
"""

import math

# A chunk's logits take this part of what the widest shard's weight takes in fp32, beside a gradient of that size; and
# not less than so many bytes, below which matrix products lose speed. On a device more: each chunk reads and writes
# the sum of the weight's gradient, which takes as long as the products of some 300 tokens. There half is free where
# the weight is bf16: when the chunks are done, its gradient's rounding takes as much. (H/2 tokens a chunk on one
# rank.)
CHUNK_OF_WEIGHT, DEVICE_CHUNK_OF_WEIGHT = 1 / 4, 1 / 2
LEAST_CHUNK_BYTES, LEAST_DEVICE_CHUNK_BYTES = 16 << 20, 256 << 20


def default_chunk_bytes(weight_bytes: int, device: bool) -> int:
    """Return what a chunk's logits may take beside a weight of so many bytes in fp32."""
    share = DEVICE_CHUNK_OF_WEIGHT if device else CHUNK_OF_WEIGHT
    return max(LEAST_DEVICE_CHUNK_BYTES if device else LEAST_CHUNK_BYTES, int(weight_bytes * share))


def chunk_length(tokens: int, most: int) -> int:
    """Return the tokens of a chunk: as few chunks as `most` allows, alike in length, a multiple of 8 where that fits.

    A last chunk of a few tokens would cost a pass over weight and gradient all the same.
    """
    chunks = max(1, math.ceil(tokens / most))
    alike = math.ceil(tokens / chunks)
    rounded = 8 * math.ceil(alike / 8)
    last = tokens - (chunks - 1) * rounded
    return rounded if rounded <= most and 2 * last >= alike else alike


def chunk_slices(tokens: int, token_bytes: int, budget: int) -> list[slice]:
    """Return the chunks of all tokens, of `token_bytes` each, within a budget; at least one token a chunk."""
    step = chunk_length(tokens, max(1, budget // token_bytes))
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, max(1, step))]


# In bf16 on a device, a group of tokens is what one product of the weight's gradient takes. All of them where their
# logits take no more than the fp32 sum that more groups would need; else as many as took half of that in fp32.
BF16_BYTES, FP32_BYTES = 2, 4
LEAST_PIECE = 512  # tokens, below which a product slows down


def bf16_groups(
    tokens: int, widest: int, hidden: int, rounded: bool, several_ranks: bool, chunk_bytes: int | None
) -> list[list[slice]]:
    """Return the pieces of each group of tokens, for logits in bf16.

    Args:
        tokens: how many, at least 1.
        widest: columns of the largest shard.
        hidden: size of a hidden state.
        rounded: whether the weight's gradient is returned in bf16: one group then needs no sum in fp32.
        several_ranks: whether statistics travel.
        chunk_bytes: what a group's logits may take; None: as above.
    """
    sum_bytes, token_bytes = FP32_BYTES * widest * hidden, BF16_BYTES * max(1, widest)
    budget = chunk_bytes
    if budget is None:
        budget = max(LEAST_DEVICE_CHUNK_BYTES, int(sum_bytes * DEVICE_CHUNK_OF_WEIGHT))
        if rounded and tokens * token_bytes <= sum_bytes:
            budget = sum_bytes
    groups = []
    for group in chunk_slices(tokens, token_bytes, budget):
        length = group.stop - group.start
        step = length
        if several_ranks and length >= 2 * LEAST_PIECE:
            step = chunk_length(length, -(-length // 2))
        groups.append([slice(at, min(at + step, group.stop)) for at in range(group.start, group.stop, step)])
    return groups


def chunk_bytes_problem(chunk_bytes: object) -> str | None:
    """Return what is wrong with a budget that a caller passed, or None."""
    if chunk_bytes is None or (
        isinstance(chunk_bytes, int) and not isinstance(chunk_bytes, bool) and chunk_bytes > 0
    ):
        return None
    return f"chunk_bytes must be None or an integer of at least 1, got {chunk_bytes!r}"
