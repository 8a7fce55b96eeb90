"""Simulation of a run's vocabulary split on one machine, with one process per tensor-parallel rank."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.preflight.ranks import join, run_ranks
from smoothing import VocabShard, vocab_parallel_cross_entropy


def simulate_split(
    logits_TV: Tensor, target_T: Tensor, options: dict[str, Any], ranks: int
) -> tuple[list[float], Tensor]:
    """Compute the sharded loss of these logits on `ranks` gloo processes on the CPU.

    Args:
        logits_TV: Whole logits.
        target_T: Labels.
        options: Keyword arguments of the loss, a whole `smoothing_prior` among them.
        ranks: How many.

    Returns:
        Each rank's loss, and the gradient of all logits.

    Raises:
        RuntimeError: with the ranks' error output, if one of them fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save((logits_TV, target_T, options), Path(folder) / "input.pt")
        run_ranks("launch.preflight.split", ranks, folder)
        results = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    return [loss for loss, _ in results], torch.cat([gradient for _, gradient in results], dim=1)


def _one_rank(rank: int, ranks: int, folder: str) -> None:
    join(rank, ranks, folder)
    logits_TV, target_T, options = torch.load(Path(folder) / "input.pt", weights_only=True)
    shard = VocabShard.split(logits_TV.shape[1], dist.group.WORLD)
    own_TS = logits_TV[:, shard.start : shard.stop].clone().requires_grad_()
    if (prior_V := options["smoothing_prior"]) is not None:
        options["smoothing_prior"] = shard.part_of(prior_V)
    loss = vocab_parallel_cross_entropy(own_TS, target_T, shard, **options)
    assert isinstance(loss, Tensor)  # without return_stats
    loss.backward()
    torch.save((loss.item(), own_TS.grad), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    _one_rank(rank=int(sys.argv[3]), ranks=int(sys.argv[1]), folder=sys.argv[2])
