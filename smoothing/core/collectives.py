"""The collectives of this package's losses: gathers of statistics, and sums of what each shard contributes."""

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from smoothing.shard import VocabShard

# torch 2.13 renamed it and warns at the old name; 2.11 has only that one
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather(message: Tensor, shard: VocabShard) -> Tensor:
    """Every rank's `message` (of one shape), flat: `[R, n]`. Collectives: one all-gather."""
    return start_all_gather(message, shard)()


def start_all_gather(message: Tensor, shard: VocabShard) -> Callable[[], Tensor]:
    """Send `message` off; calling what is returned waits, and gives every rank's, flat: `[R, n]`.

    Collectives: one all-gather, none with one rank.
    """
    if shard.world_size == 1:
        return lambda: message.reshape(1, -1)
    messages = message.new_empty(shard.world_size * message.numel())  # gloo takes it flat only
    sent = message.contiguous().view(-1)
    work = _all_gather(messages, sent, group=shard.group, async_op=True)

    def all_gather_wait() -> Tensor:  # by this name a stack trace tells what is waited for
        work.wait()
        return messages.view(shard.world_size, sent.numel())

    return all_gather_wait


def start_all_reduce(part: Tensor, shard: VocabShard) -> Callable[[], object]:
    """Begin to sum the ranks' contiguous `part` in place; it holds the sum once the returned call has returned.

    Collectives: one all-reduce, none with one rank.
    """
    if shard.world_size == 1:
        return lambda: None
    work = dist.all_reduce(part, group=shard.group, async_op=True)

    def all_reduce_wait() -> None:
        work.wait()

    return all_reduce_wait
