"""The one collective of this package's losses."""

import torch.distributed as dist
from torch import Tensor

from smoothing.shard import VocabShard

# torch 2.13 renamed it and warns at the old name; 2.11 has only that one
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather(message: Tensor, shard: VocabShard) -> Tensor:
    """Every rank's `message` (of one shape), flat: `[R, n]`. Collectives: one all-gather."""
    messages = message.new_empty(shard.world_size * message.numel())  # gloo takes it flat only
    _all_gather(messages, message.contiguous().view(-1), group=shard.group)
    return messages.view(shard.world_size, -1)
