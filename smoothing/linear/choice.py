"""Which of its two loops the fused head runs."""

import torch
from torch import Tensor

from smoothing.core.call import LossCall
from smoothing.kernels.dispatch import log_once, uses_triton
from smoothing.linear import matmul


def runs_in_bf16(call: LossCall, bias: Tensor | None, fp32_logits: bool) -> bool:
    """Return whether `bf16_loop` runs: in bf16 on a device, for logits that are linear and have no bias.

    Not with `fp32_logits`, which keeps the logits in fp32 between the products. Logged once, under `smoothing`.
    """
    device = call.target.device
    if fp32_logits or bias is not None or call.options.logit_softcap is not None:
        return False
    if matmul.gemm_dtype(call.input_dtype, call.statistics_dtype, device) != torch.bfloat16:
        return False
    if not uses_triton(device, call):
        return False
    log_once(f"fused head on {device.type}: logits in bf16, smoothing as further rows of a product")
    return True
