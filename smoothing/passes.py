"""The two passes over a shard's logits, and which code makes them: Triton kernels or torch operations.

Both modules have `statistics` (one read) and `gradient` (one read, one write), with the same arguments.
"""

import functools
import logging
import os
from types import ModuleType

import torch

from smoothing import passes_torch
from smoothing.call import LossCall

log = logging.getLogger("smoothing")


def passes(device: torch.device, call: LossCall) -> ModuleType:
    """`passes_triton` or `passes_torch`."""
    if not uses_triton(device, call):
        return passes_torch
    from smoothing import passes_triton

    return passes_triton


def uses_triton(device: torch.device, call: LossCall) -> bool:
    """Whether Triton kernels run for this call: on a CUDA device, or on the CPU in Triton's interpreter.

    Not for distributions as labels, and not in fp64: the kernels compute in fp32. Said once to the log `smoothing`.
    """
    if call.soft or call.statistics_dtype != torch.float32:
        return False
    return (device.type == "cuda" or interpreted()) and _importable()


def interpreted() -> bool:
    """Whether Triton was asked to interpret its kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _importable() -> bool:
    try:
        from smoothing import passes_triton  # noqa: F401
    except ImportError as fault:
        log.warning("passes over logits are torch operations: the Triton kernels cannot be imported (%s)", fault)
        return False
    log.info("passes over logits are Triton kernels%s", ", interpreted" if interpreted() else "")
    return True
