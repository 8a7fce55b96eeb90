"""Checks of the arguments that all losses share: each returns a sentence of what is wrong, or None."""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from smoothing.core.options import LossOptions
from smoothing.shard import VocabShard

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor_problem(**given: object) -> str | None:
    """Return which of these is no dense tensor with a last dimension on the first one's device, or None."""
    device: torch.device | None = None
    for name, value in given.items():
        if not isinstance(value, Tensor):
            return f"{name} must be a tensor, got {type(value).__name__}"
        if value.dim() == 0:
            return f"{name} must have at least one dimension, got none"
        device = device or value.device
        if problem := _placement_problem(name, value, device):
            return problem
    return None


def _placement_problem(name: str, given: Tensor, device: torch.device) -> str | None:
    if given.layout != torch.strided:
        return f"{name} must be a dense tensor, got {given.layout}"
    if given.device.type == "meta":
        return f"{name} must hold data, got a tensor on the device meta"
    if given.device != device:
        return f"{name} must be on the input's device, {device}, got {given.device}"
    return None


def dtype_problem(**tensors: Tensor | None) -> str | None:
    """Return which of these has a dtype that no loss can be computed in, or None."""
    for name, given in tensors.items():
        if given is not None and given.dtype not in FLOAT_DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
            return f"{name} must have a floating-point dtype ({known}), got {given.dtype}"
    return None


def head_problem(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Return what is wrong with a head's weight and bias for these hidden states, or None."""
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        return f"weight must have shape [S, {hidden.shape[-1]}], this rank's rows, got {tuple(weight.shape)}"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"bias must have shape {tuple(weight.shape[:1])}, one number for each row, got {tuple(bias.shape)}"
    return None


def argument_problem(
    given: Tensor,
    target: object,
    shard: object,
    options: LossOptions,
    prior: object,
    num_items_in_batch: object,
    width: int,
) -> str | None:
    """Return what is wrong with the arguments that all losses share, or None.

    Args:
        given: logits or hidden states, `[..., S or H]`.
        width: columns of this rank's logits, S.
    """
    if not isinstance(shard, VocabShard):
        return f"shard must be a VocabShard or None, got {type(shard).__name__}"
    if problem := options.problem() or shard.problem():
        return problem
    leading = given.shape[:-1]
    if width != shard.size:
        return (
            f"this rank's shard is [{shard.start}, {shard.stop}), so {shard.size} vocabulary columns were expected, "
            f"got {width}"
        )
    if not isinstance(target, Tensor):
        return f"target must be a tensor, got {type(target).__name__}"
    if problem := _placement_problem("target", target, given.device):
        return problem
    if target.is_floating_point():
        if target.shape != (*leading, width):
            return f"probabilities must have the logits' shape {(*leading, width)}, got {tuple(target.shape)}"
    elif target.dtype != torch.int64:
        return f"target must be int64 token ids (or floating-point probabilities), got {target.dtype}"
    elif target.shape != leading:
        return (
            f"target must have shape {tuple(leading)}, one id for each token, got {tuple(target.shape)}"
            f"{_classes_second(given, target)}"
        )
    elif target.device.type == "cpu" and (problem := _target_problem(target, shard, options)):
        return problem
    if prior is not None and (not isinstance(prior, Tensor) or prior.shape != (width,)):
        got = tuple(prior.shape) if isinstance(prior, Tensor) else type(prior).__name__
        return f"smoothing_prior must be this rank's slice of a distribution, of shape {(width,)}, got {got}"
    if prior is not None and (problem := _placement_problem("smoothing_prior", prior, given.device)):
        return problem
    for name, labels in (("target", target), ("smoothing_prior", prior)):
        if isinstance(labels, Tensor) and labels.requires_grad and torch.is_grad_enabled():
            return f"{name} gets no gradient from this loss; pass {name}.detach()"
    if num_items_in_batch is not None:
        if options.reduction != "mean":
            return f"num_items_in_batch replaces the divisor of reduction='mean', got reduction={options.reduction!r}"
        return _items_problem(num_items_in_batch)
    return None


def _classes_second(given: Tensor, target: Tensor) -> str:
    """Return what to do if the shapes are those of `F.cross_entropy`'s `[N, C, d]` and `[N, d]`, else nothing."""
    if given.dim() < 3 or target.shape != (given.shape[0], *given.shape[2:]):
        return ""
    return "; classes are the last dimension here, not the second as F.cross_entropy takes them: .movedim(1, -1)"


def _items_problem(items: object) -> str | None:
    """What is wrong with `num_items_in_batch`, or None; on a device it is not looked at."""
    if isinstance(items, Tensor):
        if items.numel() != 1:
            return f"num_items_in_batch must be one number, got shape {tuple(items.shape)}"
        if items.device.type != "cpu":
            return None
        items = items.item()
    number: Any = items  # abstract numbers have no order in typeshed
    if isinstance(items, bool) or not isinstance(items, Real) or not 0 <= number < 2**63:
        return f"num_items_in_batch must be a number of tokens, got {items!r}"
    return None


def _target_problem(target: Tensor, shard: VocabShard, options: LossOptions) -> str | None:
    outside = (target != options.ignore_index) & ((target < 0) | (target >= shard.vocab_size))
    if not bool(outside.any()):
        return None
    worst = target[outside][0].item()
    return (
        f"target must lie in [0, {shard.vocab_size}) or be ignore_index ({options.ignore_index}), "
        f"got {worst} ({int(outside.sum())} such)"
    )
