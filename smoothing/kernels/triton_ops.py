"""The two passes over a shard's logits by Triton kernels: one read for statistics, one read and write for gradients.

What is between them, a few numbers a token, is one kernel more: dozens of launches would take as long as a pass.
Whatever floating dtype and strides the logits have, no fp32 copy is made. `dispatch` says when these run,
`torch_ops` what they compute, `triton_kernels` how.
"""

import torch
import triton
from torch import Tensor

from smoothing.core import agreement
from smoothing.core.call import LossCall
from smoothing.core.statistics import Combined, ShardStatistics
from smoothing.kernels import triton_kernels

BLOCK = 4096  # columns of a row looked at together
COMBINE_BLOCK = 128  # tokens whose statistics a program adds up
SCALE_BLOCK = 16384  # elements of a gradient that a program scales
COMPILER_OPTIONS = {"enable_fp_fusion": True}  # a product and a sum as one; Triton 3.10 will not by itself


def statistics(logits_TS: Tensor, target: Tensor, call: LossCall, with_prior: bool = True) -> ShardStatistics:
    """This rank's statistics, `[T]` each: one read. `with_prior=False`: Σ u_v z_v is not taken."""
    count, fields = len(target), 4 if with_prior else 3
    options, real_size = call.options, call.shard.real_size
    stats_FT = torch.empty(fields, count, dtype=torch.float32, device=logits_TS.device)
    if real_size == 0:
        return ShardStatistics.nothing(
            count, soft=False, prior=with_prior, dtype=torch.float32, device=logits_TS.device
        )
    if count:
        with _current(logits_TS):
            triton_kernels.statistics_kernel[(count,)](
                logits_TS,
                *logits_TS.stride(),
                target.contiguous(),
                _prior(call, logits_TS),
                stats_FT,
                count,
                call.shard.start,
                real_size,
                1 / call.shard.vocab_size,
                options.ignore_index,
                options.logit_softcap or 1.0,
                CAPPED=options.logit_softcap is not None,
                SMOOTHED=with_prior and options.label_smoothing > 0,
                WITH_FIELD=with_prior,
                UNIFORM=call.prior is None,
                BLOCK=_block(real_size),
                **COMPILER_OPTIONS,
            )
    return ShardStatistics(*stats_FT.unbind(), *([] if with_prior else [None]))


def combine(
    stats_RFT: Tensor, headers_RH: Tensor | None, target: Tensor, call: LossCall, with_prior: bool = True
) -> tuple[Combined, Tensor, Tensor | None]:
    """All ranks' statistics added up, their softmax scale, and the losses. See `torch_ops`."""
    count, options = len(target), call.options
    # apart from one another: two are kept for backward, and the loss is a caller's, who may write over it
    kept_2T, seen_4T, loss_T = (
        torch.empty(*rows, count, dtype=torch.float32, device=stats_RFT.device) for rows in ((2,), (4,), ())
    )
    if count:
        header = headers_RH if headers_RH is not None else target  # any tensor: it is not read
        with _current(stats_RFT):
            triton_kernels.combine_kernel[(triton.cdiv(count, COMBINE_BLOCK),)](
                stats_RFT,
                *stats_RFT.stride()[:2],
                header,
                header.view(torch.float64),
                target.contiguous(),
                kept_2T,
                seen_4T,
                loss_T,
                count,
                call.shard.vocab_size,
                options.ignore_index,
                1 - options.label_smoothing,
                options.label_smoothing,
                options.z_loss,
                RANKS=len(stats_RFT),
                HEADER=agreement.HEADER_FIELDS,
                START=agreement.OFFSET["start"],
                MASS=agreement.OFFSET["prior_mass"],
                WITH_FIELD=with_prior,
                BLOCK=COMBINE_BLOCK,
                **COMPILER_OPTIONS,
            )
    maximum_T, scale_T = kept_2T
    return Combined(maximum_T, *seen_4T), scale_T, loss_T if with_prior else None


def gradient(
    logits_TS: Tensor,
    target: Tensor,
    call: LossCall,
    base_T: Tensor,
    scale_T: Tensor,
    weight_T: Tensor,
    out_TS: Tensor,
    with_prior: bool = True,
) -> Tensor:
    """The gradient of the logits into `out_TS`, maybe their memory: one read, one write. See `torch_ops`."""
    options, (count, width) = call.options, out_TS.shape
    if count == 0 or width == 0:
        return out_TS
    block, narrowed = _block(width), out_TS.element_size() < logits_TS.element_size()
    blocks = 1 if narrowed else triton.cdiv(width, block)
    with _current(logits_TS):
        triton_kernels.gradient_kernel[(count * blocks,)](
            logits_TS,
            *logits_TS.stride(),
            out_TS,
            *out_TS.stride(),
            target.contiguous(),
            _prior(call, logits_TS),
            base_T,
            scale_T,
            weight_T,
            weight_T.stride(0),  # 0 where it is one number, expanded
            blocks,
            call.shard.start,
            call.shard.real_size,
            width,
            options.ignore_index,
            1 - options.label_smoothing,
            options.label_smoothing if call.prior is not None else options.label_smoothing / call.shard.vocab_size,
            options.logit_softcap or 1.0,
            CAPPED=options.logit_softcap is not None,
            SMOOTHED=with_prior and options.label_smoothing > 0,
            UNIFORM=call.prior is None,
            NARROWED=narrowed,
            BLOCK=block,
            **COMPILER_OPTIONS,
        )
    return out_TS


def scale(gradient: Tensor, factor: Tensor) -> None:
    """`gradient *= factor`, one number, in contiguous memory; a factor of 1 reads nothing, and no host waits."""
    if count := gradient.numel():
        with _current(gradient):
            triton_kernels.scale_kernel[(triton.cdiv(count, SCALE_BLOCK),)](
                gradient, factor, count, BLOCK=SCALE_BLOCK, **COMPILER_OPTIONS
            )


def _current(logits_TS: Tensor) -> torch.cuda.device:
    """Triton launches on the current device, whatever device its arguments lie on."""
    return torch.cuda.device(logits_TS.get_device())  # -1 on the CPU, where nothing is done


def _prior(call: LossCall, logits_TS: Tensor) -> Tensor:
    """The prior as a kernel reads it; for a uniform one any tensor, which is not read."""
    return logits_TS if call.prior is None else call.prior.contiguous()


def _block(width: int) -> int:
    return int(min(BLOCK, triton.next_power_of_2(max(width, 16))))
