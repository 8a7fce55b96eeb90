"""The backends of the loss, Triton kernels and torch operations, and which one runs for a call.

Legend: T tokens, S columns of this rank (padding included), R ranks, F statistics.
"""

import logging
from typing import Protocol

import torch
from torch import Tensor

from smoothing.core.call import LossCall
from smoothing.core.statistics import Combined, ShardStatistics
from smoothing.kernels import torch_ops
from smoothing.kernels.interpreter import interpreted

log = logging.getLogger("smoothing")
_logged: set[str] = set()
_triton_works: dict[str, bool] = {}  # by the kind of device


class Backend(Protocol):
    """What is done with a shard's logits. The modules `torch_ops` and `triton_ops` are the two backends."""

    def statistics(
        self, logits_TS: Tensor, target: Tensor, call: LossCall, with_prior: bool = True
    ) -> ShardStatistics:
        """Describe the logits to the other ranks: one read. `with_prior=False`: Σ u_v z_v is not taken."""

    def combine(
        self,
        stats_RFT: Tensor,
        headers_RH: Tensor | None,
        target: Tensor,
        call: LossCall,
        with_prior: bool = True,
    ) -> tuple[Combined, Tensor, Tensor | None]:
        """Add up all ranks' statistics: also `LossCall.softmax_scale` `[T]`, and the losses `[T]` if known."""

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
    ) -> Tensor:
        """Write the gradient of the logits to `out_TS`, which may be their own memory: one read, one write."""

    def scale(self, gradient: Tensor, factor: Tensor) -> None:
        """Multiply a gradient by a single number, in place; a factor of 1 costs nothing."""


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
    _log_once(f"backend of the loss on {device.type}: {name}")
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
            _log_once(
                "Triton kernels cannot be used, and torch operations are slower (the kernels need Triton, a C "
                f"compiler and Python's headers): {error}",
                logging.WARNING,
            )
            _triton_works[device.type] = False
    return _triton_works[device.type]


def _log_once(message: str, level: int = logging.INFO) -> None:
    if message not in _logged:  # no functools.cache here or in `call`: torch.compile warns of it
        _logged.add(message)
        log.log(level, message)
