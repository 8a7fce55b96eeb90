"""A rank whose arguments are wrong tells the other ranks, in the collective that they wait in, and raises."""

from contextlib import suppress
from typing import NoReturn

import torch
from torch import Tensor

from smoothing.core import agreement
from smoothing.core.agreement import Header
from smoothing.core.statistics import ShardStatistics
from smoothing.shard import VocabShard


def refuse_at_handshake(error: Exception, shard: object, given: object, target: object) -> NoReturn:
    """Raise `error` as a `ValueError` here; the other ranks learn of it in `agreement.start_handshake`.

    The arguments are those of the call, which may be anything. Collectives: one all-gather of a header.
    """
    if isinstance(shard, VocabShard) and shard.world_size > 1:
        device, _ = _device_and_tokens(given, target)
        with suppress(ValueError):  # the handshake tells this rank what it already knows
            agreement.start_handshake(Header.refusal().encode().to(device), shard)()
    raise _as_value_error(error)


def refuse_at_exchange(error: Exception, shard: object, given: object, target: object) -> NoReturn:
    """Raise `error` as a `ValueError` here; the other ranks learn of it in `agreement.exchange`.

    The arguments are those of the call, which may be anything. Collectives: one all-gather of a header, if the
    shard has not been agreed on; else one of a header and statistics, of the size that the arguments suggest: a
    backend may end the processes if one rank sends another size than the others.
    """
    if isinstance(shard, VocabShard) and shard.world_size > 1:
        device, tokens = _device_and_tokens(given, target)
        header_H = Header.refusal().encode().to(device)
        soft = isinstance(target, Tensor) and target.is_floating_point()
        dtype = torch.float64 if isinstance(given, Tensor) and given.dtype == torch.float64 else torch.float32
        nothing = ShardStatistics.nothing(tokens, soft, dtype=dtype, device=device)
        with suppress(ValueError):
            agreement.shake_hands_once(header_H, shard)
            agreement.exchange(nothing.stack(), header_H, shard)
    raise _as_value_error(error)


def _device_and_tokens(given: object, target: object) -> tuple[torch.device, int]:
    """Where the other ranks' message is, and of how many tokens, as far as these arguments tell."""
    tokens, device = 0, torch.device("cpu")
    if isinstance(given, Tensor) and given.dim():
        tokens, device = given.shape[:-1].numel(), given.device
    elif isinstance(target, Tensor):
        tokens = target.shape[:-1].numel() if target.is_floating_point() else target.numel()
        device = target.device
    return torch.device("cpu") if device.type == "meta" else device, tokens


def _as_value_error(error: Exception) -> ValueError:
    return error if isinstance(error, ValueError) else ValueError(f"{type(error).__name__}: {error}")
