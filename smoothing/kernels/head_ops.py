"""What is around the products of the fused head where these are in bf16: one kernel each (`head_kernels`).

Legend: T tokens, N of them that go through the head, H hidden, K real rows of this rank's weight, E further rows that
carry the smoothing term.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from smoothing.core.call import LossCall
from smoothing.kernels import head_kernels
from smoothing.kernels.triton_ops import COMPILER_OPTIONS, cdiv, items_of, on_device

LABELLED_BLOCK = 1024  # labels that the one program looks at together
BLOCK_T, BLOCK_H = 32, 128  # tokens and columns of a program
PARTIALS = 32  # partial sums that are added up together
PARTS = head_kernels.PARTS.value


def labelled(target_T: Tensor, ignore_index: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the `count` tokens that have a label, without a word to the host.

    Returns:
        Their places `[N]` int64 and labels `[N]`; where each of all tokens went `[T]` int32, or -1; and how many
        there are `[]`, for whoever asserts that they are `count`.
    """
    total, device = len(target_T), target_T.device
    rows_N, labels_N = (torch.empty(count, dtype=torch.int64, device=device) for _ in range(2))
    position_T = torch.empty(total, dtype=torch.int32, device=device)
    found = torch.empty((), dtype=torch.int32, device=device)
    with on_device(target_T):
        head_kernels.labelled_kernel[(1,)](
            target_T.contiguous(),
            rows_N,
            labels_N,
            position_T,
            found,
            total,
            count,
            ignore_index,
            BLOCK=LABELLED_BLOCK,
            **COMPILER_OPTIONS,
        )
    return rows_N, labels_N, position_T, found


class Gathered(NamedTuple):
    """Hidden states as the products take them."""

    states_NH: Tensor
    scaled_NH: Tensor  # times each token's weight; the same tensor where all weigh alike
    sums_PH: Tensor | None  # Σ over some tokens of the latter, in fp32
    share: Tensor  # `[]`, what the gradient of the logits is scaled by


def gather(
    hidden_TH: Tensor,
    rows_N: Tensor | None,
    call: LossCall,
    first: int,
    items: int | Tensor | None,
    weight_N: Tensor | None,
    summed: bool,
) -> Gathered:
    """Collect the labelled tokens' hidden states in the products' dtype, with `first` rows left free before them.

    Args:
        hidden_TH: all tokens' hidden states.
        rows_N: which of them; None for all.
        call: the call, whose targets are those of the N tokens.
        first: rows at the front of what is returned that are not written.
        items: the divisor, as in `LossCall.divisor`; a number where it is known.
        weight_N: what each token's loss is scaled by instead, or None.
        summed: whether Σ of the states is wanted.
    """
    count, hidden = call.tokens, hidden_TH.shape[1]
    device, shape = hidden_TH.device, (first + count, hidden)
    states_NH = torch.empty(shape, dtype=call.input_dtype, device=device)
    scaled_NH = states_NH if weight_N is None else torch.empty_like(states_NH)
    blocks = cdiv(count, BLOCK_T)
    sums_PH = torch.empty(blocks, hidden, dtype=torch.float32, device=device) if summed else None
    share = torch.empty((), dtype=torch.float32, device=device)
    kind, number, tensor = ("number", 1.0, None) if weight_N is not None else items_of(call, items, device)
    hidden_TH = hidden_TH if hidden_TH.stride(1) == 1 else hidden_TH.contiguous()
    with on_device(hidden_TH):
        head_kernels.gather_kernel[(blocks * cdiv(hidden, BLOCK_H),)](
            hidden_TH,
            hidden_TH.stride(0),
            call.target if rows_N is None else rows_N,
            call.target,
            share if weight_N is None else weight_N,
            states_NH[first:],
            scaled_NH[first:],
            share if sums_PH is None else sums_PH,
            share,
            share if tensor is None else tensor,
            number,
            count,
            hidden,
            call.options.ignore_index,
            ITEMS=kind,
            SELECTED=rows_N is not None,
            WEIGHTED=weight_N is not None,
            SUMMED=summed,
            BLOCK_T=BLOCK_T,
            BLOCK_H=BLOCK_H,
            **COMPILER_OPTIONS,
        )
    return Gathered(states_NH, scaled_NH, sums_PH, share)


def further_rows(tokens: int) -> int:
    """Return E for a product over so many tokens: in all a multiple of 8, as the matrix units want it."""
    return int(PARTS + -(tokens + PARTS) % 8)


def write_prior_rows(gathered: Gathered, tile_EK: Tensor, call: LossCall) -> None:
    """Write the rows whose product is `-share·ε·u ⊗ Σ h`: at the front of the scaled states, and of a tile."""
    assert gathered.sums_PH is not None
    blocks, hidden = gathered.sums_PH.shape
    rows, real_size = tile_EK.shape
    with on_device(tile_EK):
        head_kernels.prior_rows_kernel[(cdiv(hidden, BLOCK_H) + cdiv(real_size, BLOCK_H),)](
            gathered.sums_PH,
            gathered.scaled_NH,
            tile_EK,
            tile_EK.stride(0),
            gathered.share if call.prior is None else call.prior.contiguous(),
            gathered.share,
            prior_share(call),
            blocks,
            rows,
            hidden,
            real_size,
            UNIFORM=call.prior is None,
            BLOCK_T=PARTIALS,
            BLOCK=BLOCK_H,
            **COMPILER_OPTIONS,
        )


def hidden_gradient(
    products_NH: Tensor,
    leading: torch.Size,
    dtype: torch.dtype,
    call: LossCall,
    position_T: Tensor | None,
    share: Tensor,
    weight_N: Tensor | None,
    mean_row_H: Tensor | None,
) -> Tensor:
    """Return all tokens' gradients of the hidden states, `[T, H]`: `weight·(product - share·ε·w̄)`.

    Args:
        products_NH: the ranks' summed products.
        leading: the tokens' shape, T in number.
        dtype: that of the hidden states.
        call: the call, whose targets are those of the N tokens.
        position_T: where each of all tokens went, or -1; None for N = T.
        share: what the gradient of the logits was scaled by.
        weight_N: what each token's loss is scaled by beside that, or None.
        mean_row_H: Σ_v W_v where the prior is uniform, else Σ_v u_v W_v; None without smoothing.
    """
    out_TH = torch.empty(leading.numel(), products_NH.shape[1], dtype=dtype, device=products_NH.device)
    count, hidden = out_TH.shape
    with on_device(products_NH):
        head_kernels.hidden_gradient_kernel[(cdiv(count, BLOCK_T) * cdiv(hidden, BLOCK_H),)](
            products_NH,
            call.target if position_T is None else position_T,
            call.target,
            share if weight_N is None else weight_N,
            share if mean_row_H is None else mean_row_H,
            share,
            out_TH,
            prior_share(call),
            count,
            hidden,
            call.options.ignore_index,
            SELECTED=position_T is not None,
            WEIGHTED=weight_N is not None,
            SMOOTHED=mean_row_H is not None,
            ROUNDED=call.prior is None,
            BLOCK_T=BLOCK_T,
            BLOCK_H=BLOCK_H,
            **COMPILER_OPTIONS,
        )
    return out_TH


def prior_share(call: LossCall) -> float:
    """Return what makes a sum over the vocabulary ε times the prior's: ε, or ε/V where it is uniform."""
    epsilon = call.options.label_smoothing
    return epsilon if call.prior is not None else epsilon / call.shard.vocab_size
