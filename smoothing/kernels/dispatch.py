"""The backends of the loss, Triton kernels and torch operations, and which one runs for a call.

Legend: T tokens, S columns of this rank (padding included), R ranks, F statistics.
"""

import logging
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from smoothing.core.call import LossCall
from smoothing.core.statistics import Combined, Losses
from smoothing.kernels import torch_ops
from smoothing.kernels.interpreter import interpreted

log = logging.getLogger("smoothing")
_logged: set[str] = set()
_triton_works: dict[str, bool] = {}  # by the kind of device


class Backend(Protocol):
    """What is done with a shard's logits. The modules `torch_ops` and `triton_ops` are the two backends.

    Args that several methods share:
        logits_TS: this rank's logits, `[T, S]` fp32, bf16, fp16 or fp64, any strides.
        target: labels, `[T]` int64, or probabilities of this rank's columns, `[T, S]` floating point.
        call: options, shard, prior and the dtype of the statistics.
        with_prior: whether Σ u_v z_v (in a gradient ε·u) is taken from the logits.
    """

    checks_labels: bool  # on one rank: `combine` and `reduce` assert labels on the device

    def statistics(self, logits_TS: Tensor, target: Tensor, call: LossCall, with_prior: bool = True) -> Tensor:
        """Describe the logits to the other ranks: one read.

        Returns:
            `[F, T]`, `ShardStatistics` as it travels; the numbers of a token without a label are finite.
        """

    def combine(
        self,
        stats_RFT: Tensor,
        headers_RH: Tensor | None,
        target: Tensor,
        call: LossCall,
        with_prior: bool = True,
    ) -> tuple[Combined, Tensor, Losses | None]:
        """Add up all ranks' statistics.

        Args:
            stats_RFT: the statistics of each rank, in the order of the ranks.
            headers_RH: their headers, int64; None for one rank.

        Returns:
            The sums, `LossCall.softmax_scale` `[T]` of them, and the losses, 0 for a token without a label;
            None for the losses if `with_prior` is False, since they are not known yet.
        """

    def reduce(self, losses: Losses, call: LossCall, items: int | Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the loss as the call's reduction has it, and what a sum was divided by, `[]`; None for "none".

        Args:
            items: what "mean" divides by instead of the labels' number, or None.
        """

    def gradient(
        self,
        logits_TS: Tensor,
        target: Tensor,
        call: LossCall,
        base_T: Tensor,
        scale_T: Tensor,
        weight_T: Tensor,
        out_TS: Tensor,
        with_prior: bool = True,
        divisor: Tensor | None = None,
    ) -> Tensor:
        """Write the gradient of the logits: one read, one write.

            ∂z_v = weight·(scale·exp(z_v - base) - (1-ε)·q_v - ε·u_v)·(1 - (z_v/cap)²)

        Args:
            base_T: what logits are taken relative to, the maximum over the vocabulary.
            scale_T: makes `exp(z - base)` a probability, times its factor from a z-loss.
            weight_T: what the loss of each token is scaled by; may be one number, expanded or `[]`.
            divisor: what that is divided by, one number; None: nothing.
            out_TS: where to write, at most as wide a dtype as the logits'; it may be their own memory.

        Returns:
            `out_TS`. Padding columns and tokens without a label are 0.
        """

    def scale(self, gradients: Sequence[Tensor], factor: Tensor) -> None:
        """Multiply gradients by a single number, in place; a factor of 1 costs nothing."""


def backend_for(device: torch.device, call: LossCall) -> Backend:
    """Return the backend that serves this call on this device."""
    if not uses_triton(device, call):
        return torch_ops
    from smoothing.kernels import triton_ops

    return triton_ops


def uses_triton(device: torch.device, call: LossCall) -> bool:
    """Return whether Triton kernels run for this call: on a CUDA device, or on the CPU in Triton's interpreter.

    Not with probabilities as labels, and not in fp64: the kernels compute in fp32. Logged once, under `smoothing`.
    """
    served = not call.soft and call.statistics_dtype == torch.float32
    triton = served and (device.type == "cuda" or interpreted()) and _works_on(device)
    name = "torch operations" if not triton else "Triton kernels" + (", interpreted" if interpreted() else "")
    log_once(f"backend of the loss on {device.type}: {name}")
    return triton


def _works_on(device: torch.device) -> bool:
    """Whether Triton is there, and can build what launches its kernels, for which it needs a C compiler."""
    if device.type not in _triton_works:
        try:
            import triton

            from smoothing.kernels import triton_ops  # noqa: F401

            if not interpreted():
                _ = triton.runtime.driver.active.utils
            _triton_works[device.type] = True
        except Exception as error:
            log_once(
                "Triton kernels cannot be used, and torch operations are slower (the kernels need Triton, a C "
                f"compiler and Python's headers): {error}",
                logging.WARNING,
            )
            _triton_works[device.type] = False
    return _triton_works[device.type]


def log_once(message: str, level: int = logging.INFO) -> None:
    """Log a choice the first time that it is made."""
    if message not in _logged:  # no functools.cache here or in `call`: torch.compile warns of it
        _logged.add(message)
        log.log(level, message)
