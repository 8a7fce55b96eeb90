"""A kernel that can be wrong in every way that `kernel_memory` is to see."""

import triton
import triton.language as tl


@triton.jit
def double(given, doubled, sums, WRONG: tl.constexpr):
    at = tl.program_id(0) * 4 + tl.arange(0, 4)
    x = tl.load(given + at + (1 if WRONG == "past the end" else 0))
    tl.store(doubled + (at % 4 if WRONG == "same place" else at), 2 * x)
    if WRONG == "neighbour":
        tl.load(doubled + (at + 4) % 8)
    if WRONG == "too late":
        tl.load(doubled + at)
    if WRONG == "atomic":
        tl.atomic_add(sums + at, x)
