"""Tensors that torch has split over a mesh of ranks (`DTensor`): this rank's part, and which shard that is.

A dimension is split as `torch.chunk` splits it, not nearly evenly: 5 columns over 4 ranks are 2, 2, 1 and 0.
"""

import sys
from functools import lru_cache
from typing import Any

from torch import Tensor

from smoothing.shard import VocabShard

SHARDS_KEPT = 64


def is_dtensor(given: object) -> bool:
    """Return whether this is a DTensor, without importing what defines them: it is slow, and most have none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(given, module.DTensor)


def local_logits(
    logits: Any, target: Any, prior: Any, shard: VocabShard | None
) -> tuple[Tensor, Any, Any, VocabShard | None]:
    """Return this rank's columns of `[..., V]` logits, the rest of the arguments, and the shard if it was None.

    Logits must be whole but for their last dimension. What is no DTensor is returned as it is. No collectives.
    """
    if is_dtensor(logits):
        shard = _shard(logits, logits.dim() - 1, "logits") if shard is None else shard
        logits = logits.to_local()
    return logits, _own(target, "target"), _own(prior, "smoothing_prior"), shard


def local_head(
    hidden: Any, weight: Any, bias: Any, target: Any, prior: Any, shard: VocabShard | None
) -> tuple[Tensor, Tensor, Tensor | None, Any, Any, VocabShard | None]:
    """Return hidden states as every rank has them, this rank's rows of weight and bias, and the rest likewise.

    Collectives: those that make hidden states whole which are split; none where they are whole already.
    """
    if is_dtensor(hidden):
        from torch.distributed.tensor import Replicate

        whole = [Replicate()] * hidden.device_mesh.ndim
        # their gradient is whole on each rank too: the loss sums up what the ranks have of it
        hidden = hidden.redistribute(placements=whole).to_local(grad_placements=whole)
    if is_dtensor(weight):
        shard = shard_of(weight) if shard is None else shard
        weight = weight.to_local()
    return hidden, weight, _own(bias, "bias"), _own(target, "target"), _own(prior, "smoothing_prior"), shard


def shard_of(weight: Any) -> VocabShard | None:
    """Return the rows that this rank holds of a head's weight, a DTensor `[V, H]`; None where it holds all."""
    return _shard(weight, 0, "the head's weight")


def _own(given: Any, name: str) -> Any:
    """This rank's part of what is split like the vocabulary, or whole."""
    if not is_dtensor(given):
        return given
    _sharded_dimension(given, given.dim() - 1, name)
    return given.to_local()


def _shard(given: Any, dim: int, name: str) -> VocabShard | None:
    mesh_dim = _sharded_dimension(given, dim, name)
    if mesh_dim is None:
        return None
    return _mesh_shard(given.device_mesh, mesh_dim, given.shape[dim])


@lru_cache(SHARDS_KEPT)  # a shard that is kept is agreed on once
def _mesh_shard(mesh: Any, mesh_dim: int, vocab_size: int) -> VocabShard:
    each = -(-vocab_size // mesh.size(mesh_dim))
    start = min(mesh.get_local_rank(mesh_dim) * each, vocab_size)
    return VocabShard(start, min(start + each, vocab_size), vocab_size, mesh.get_group(mesh_dim))


def _sharded_dimension(given: Any, dim: int, name: str) -> int | None:
    """The one dimension of its mesh that splits `given` along `dim`; None if none does."""
    from torch.distributed.tensor import Replicate, Shard

    split = [mesh_dim for mesh_dim, placement in enumerate(given.placements) if placement != Replicate()]
    if not split:
        return None
    placement = given.placements[split[0]]
    if len(split) > 1 or type(placement) is not Shard or placement.dim % given.dim() != dim:
        raise ValueError(
            f"{name} may be split along its vocabulary, by one dimension of its mesh, got {given.placements} on a "
            f"mesh of {tuple(given.device_mesh.shape)}; under FSDP call the loss in the model's forward, where "
            "weights are gathered"
        )
    return split[0]
