"""The head's three matrix products, with fp32 results whatever the dtype of their factors (fp64 for fp64).

Legend: n rows of a chunk, K real rows of this rank's weight, H hidden. On CUDA a low-precision GEMM accumulates and
returns fp32 (`out_dtype`). A CPU has no such GEMM, so there the weight is widened a block of rows at a time and the
GEMM runs in fp32: nothing is rounded on the way.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS, DEVICE_BLOCK_ELEMENTS = 1 << 21, 1 << 26  # of the weight, widened at a time: 8 or 256 MiB in fp32
ALIGNED = 64  # columns: a device's matrix units and vector loads want rows that begin at a multiple of 16 bytes


def gemm_dtype(compute_dtype: torch.dtype, statistics_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of the factors that are not the weight: `compute_dtype` only where its GEMM returns fp32."""
    return compute_dtype if device.type == "cuda" else statistics_dtype


def tile(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty matrix; on a device its rows are as far apart as products want them, whatever their length."""
    rows, columns = shape
    between = columns if device.type == "cpu" else -(-columns // ALIGNED) * ALIGNED
    return torch.empty(rows, between, dtype=dtype, device=device)[:, :columns]


def narrowed(tile_nK: Tensor, dtype: torch.dtype) -> Tensor:
    """The memory at the front of each of its rows, as a matrix of a dtype that is no wider."""
    return tile_nK.view(dtype)[:, : tile_nK.shape[1]]


def logits(hidden_nH: Tensor, weight_KH: Tensor, out_nK: Tensor) -> Tensor:
    """`h·Wᵀ` into `out_nK`."""
    if hidden_nH.dtype != weight_KH.dtype:
        for block in _blocks(weight_KH):
            torch.mm(hidden_nH, weight_KH[block].to(hidden_nH.dtype).t(), out=out_nK[:, block])
        return out_nK
    return torch.mm(hidden_nH, weight_KH.t(), out=out_nK, **_out_dtype(weight_KH, out_nK))


def hidden_gradient(grad_nK: Tensor, weight_KH: Tensor, out_nH: Tensor) -> Tensor:
    """`g·W` into `out_nH`."""
    if grad_nK.dtype != weight_KH.dtype:
        out_nH.zero_()
        for block in _blocks(weight_KH):
            out_nH.addmm_(grad_nK[:, block], weight_KH[block].to(grad_nK.dtype))
        return out_nH
    return torch.mm(grad_nK, weight_KH, out=out_nH, **_out_dtype(weight_KH, out_nH))


def weight_gradient(grad_nK: Tensor, hidden_nH: Tensor, out_KH: Tensor) -> Tensor:
    """`gᵀ·h` into `out_KH`."""
    return torch.mm(grad_nK.t(), hidden_nH, out=out_KH, **_out_dtype(hidden_nH, out_KH))


def add_weight_gradient(sum_KH: Tensor, grad_nK: Tensor, hidden_nH: Tensor) -> None:
    """`sum += gᵀ·h`."""
    torch.addmm(sum_KH, grad_nK.t(), hidden_nH, out=sum_KH, **_out_dtype(hidden_nH, sum_KH))


def weighted_row(weight_KH: Tensor, prior_K: Tensor | None, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """This shard's part of `w̄ = Σ_v u_v W_v`, `[H]`, accumulated in `dtype`; uniform for `prior_K=None`."""
    if prior_K is None:
        return weight_KH.sum(0, dtype=dtype) / vocab_size
    row_H = torch.zeros(weight_KH.shape[1], dtype=dtype, device=weight_KH.device)
    for block in _blocks(weight_KH):
        row_H.addmv_(weight_KH[block].to(dtype).t(), prior_K[block])
    return row_H


def _out_dtype(factor: Tensor, out: Tensor) -> dict[str, Any]:
    return {} if factor.dtype == out.dtype else {"out_dtype": out.dtype}


def _blocks(weight_KH: Tensor) -> Iterator[slice]:
    rows, hidden = weight_KH.shape
    elements = BLOCK_ELEMENTS if weight_KH.device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    step = max(1, elements // max(1, hidden))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
