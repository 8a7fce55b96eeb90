"""Which tokens go through the fused head: those with a label.

Legend: T tokens, N of them that go through the head.
"""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LabelledTokens:
    """The tokens that go through the head."""

    leading: torch.Size  # of all tokens, T in number
    rows_N: Tensor | None  # None for all
    masked: bool  # tokens without a label are among them
    labels_N: Tensor | None = None  # what `select` gives of the labels, where a kernel has
    position_T: Tensor | None = None  # where each token went, or -1; None for all, and where no kernel was asked
    found: Tensor | None = None  # how many have a label, to be asserted

    @classmethod
    def of(
        cls,
        leading: torch.Size,
        target: Tensor,
        ignore_index: int,
        label_tokens: int | None,
        by_kernel: bool = False,
    ) -> "LabelledTokens":
        """Find the tokens with a label.

        Args:
            leading: the tokens' shape.
            target: `[T]` int64, or probabilities `[T, S]`: then all go through the head.
            ignore_index: the label of tokens without one.
            label_tokens: how many have a label; for None the host waits until they are counted.
            by_kernel: find them by a kernel of `head_ops`; a wrong number is then asserted by `triton_ops.sum_up`.

        Raises:
            ValueError: for a wrong number; on a device by an assertion there.
        """
        if problem := label_tokens_problem(label_tokens, target):
            raise ValueError(problem)
        soft = target.is_floating_point()
        masked = not soft and keeps_every_row(target.device)
        if by_kernel and not masked:
            return cls._by_kernel(leading, target, ignore_index, label_tokens)
        rows_N = None if soft or masked else _labelled(target, ignore_index, label_tokens)
        return cls(leading, rows_N, masked)

    @classmethod
    def _by_kernel(
        cls, leading: torch.Size, target_T: Tensor, ignore_index: int, count: int | None
    ) -> "LabelledTokens":
        from smoothing.kernels import head_ops

        count = len((target_T != ignore_index).nonzero()) if count is None else int(count)
        if count == len(target_T):
            return cls(leading, None, False, target_T)
        rows_N, labels_N, position_T, found = head_ops.labelled(target_T, ignore_index, count)
        return cls(leading, rows_N, False, labels_N, position_T, found)

    def select(self, all_T: Tensor) -> Tensor:
        """Return what is given of all tokens, `[T, ...]`, for those that go through the head: `[N, ...]`."""
        return all_T if self.rows_N is None else all_T[self.rows_N]

    def scatter(self, compact_N: Tensor, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
        """Put values of the tokens that went through the head in their positions, zero elsewhere."""
        compact_N = compact_N.to(dtype or compact_N.dtype)
        if self.rows_N is None:
            return compact_N.view(shape)
        whole_T = compact_N.new_zeros(self.leading.numel(), *compact_N.shape[1:])
        whole_T[self.rows_N] = compact_N
        return whole_T.view(shape)


def keeps_every_row(device: torch.device) -> bool:
    """Return whether tokens without a label go through the head and weigh nothing, so that none need be counted.

    Only while a CUDA graph is captured, since they cost what labelled ones cost.
    """
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return bool(torch.cuda.is_current_stream_capturing())


def label_tokens_problem(count: Any, target_T: Tensor) -> str | None:
    """Return what is wrong with the number of labelled tokens that a caller passed, without counting, or None."""
    if count is None:
        return None
    if not _is_integer(count) or not 0 <= count <= len(target_T):
        return (
            f"label_tokens must be None or an integer from 0 to {len(target_T)}, the number of tokens, got {count!r}"
        )
    if target_T.is_floating_point():
        return "label_tokens counts targets that are ids; leave it out where they are probabilities"
    return None


def _is_integer(count: object) -> bool:
    return isinstance(count, Integral) and not isinstance(count, bool)


def _labelled(target_T: Tensor, ignore_index: int, count: int | None) -> Tensor | None:
    """Indices of the tokens that have a label, None if all have."""
    valid_T = target_T != ignore_index
    if count is None:
        rows_N = valid_T.nonzero().squeeze(1)
    else:
        held = valid_T.sum()
        if target_T.device.type != "cpu":
            torch._assert_async(held == count)
        elif held != count:
            raise ValueError(f"label_tokens must be the number of labelled tokens, {held}, got {count}")
        rows_N = valid_T.nonzero_static(size=int(count)).squeeze(1)
    return None if len(rows_N) == len(target_T) else rows_N
