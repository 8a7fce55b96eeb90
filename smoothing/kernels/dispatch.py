"""The passes over a shard's logits, and which code makes them: Triton kernels or torch operations.

Both modules have `statistics` (one read), `gradient` (one read, one write), between them `combine` (a few numbers a
token, of all ranks) and, for a gradient that is there already, `scale`, with the same arguments.
"""

import logging
import os
from types import ModuleType

import torch

from smoothing.core.call import LossCall
from smoothing.kernels import torch_ops as passes_torch

log = logging.getLogger("smoothing")
_told: set[str] = set()
_found: dict[str, bool] = {}  # by the kind of device


def passes(device: torch.device, call: LossCall) -> ModuleType:
    """`passes_triton` or `passes_torch`."""
    if not uses_triton(device, call):
        return passes_torch
    from smoothing.kernels import triton_ops as passes_triton

    return passes_triton


def uses_triton(device: torch.device, call: LossCall) -> bool:
    """Whether Triton kernels run for this call: on a CUDA device, or on the CPU in Triton's interpreter.

    Not for distributions as labels, and not in fp64: the kernels compute in fp32. The log `smoothing` is told, once.
    """
    served = not call.soft and call.statistics_dtype == torch.float32
    triton = served and (device.type == "cuda" or interpreted()) and _works_on(device)
    how = "torch operations" if not triton else "Triton kernels" + (", interpreted" if interpreted() else "")
    _tell(f"passes over logits on {device.type}: {how}")
    return triton


def interpreted() -> bool:
    """Whether Triton was asked to interpret its kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _works_on(device: torch.device) -> bool:
    """Whether Triton is there, and can build what launches its kernels, for which it needs a C compiler."""
    if device.type not in _found:
        try:
            from smoothing.kernels import triton_ops as passes_triton

            if not interpreted():
                _ = passes_triton.triton.runtime.driver.active.utils
            _found[device.type] = True
        except Exception as fault:
            needs = "they need Triton, a C compiler and Python's headers"
            _tell(
                f"Triton kernels cannot be used, and torch operations are slower ({needs}): {fault}", logging.WARNING
            )
            _found[device.type] = False
    return _found[device.type]


def _tell(what: str, level: int = logging.INFO) -> None:
    if what not in _told:  # no functools.cache here or in `call`: torch.compile warns of it
        _told.add(what)
        log.log(level, what)
