"""Simulation of a run's vocabulary split on one machine, with one process per tensor-parallel rank."""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from launch.preflight.ranks import join, run_ranks
from smoothing import VocabShard, vocab_parallel_cross_entropy


def simulate_split(logits_TV: Tensor, target_T: Tensor, smoothing: float, ranks: int) -> tuple[list[float], float]:
    """Compute the sharded loss of these logits on `ranks` gloo processes on the CPU.

    Returns each rank's loss, and the error of the gradient relative to fp64. Raises `RuntimeError` with the ranks'
    error output if one of them fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save((logits_TV, target_T, smoothing), Path(folder) / "input.pt")
        run_ranks("launch.preflight.split", ranks, folder)
        results = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    truth_TV = logits_TV.double().requires_grad_()
    F.cross_entropy(truth_TV, target_T, label_smoothing=smoothing).backward()
    gradient_TV = torch.cat([gradient for _, gradient in results], dim=1).double()
    error = (gradient_TV - truth_TV.grad).norm() / truth_TV.grad.norm()
    return [loss for loss, _ in results], error.item()


def _one_rank(rank: int, ranks: int, folder: str) -> None:
    join(rank, ranks, folder)
    logits_TV, target_T, smoothing = torch.load(Path(folder) / "input.pt", weights_only=True)
    shard = VocabShard.split(logits_TV.shape[1], dist.group.WORLD)
    own_TS = logits_TV[:, shard.start : shard.stop].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(own_TS, target_T, shard, label_smoothing=smoothing)
    assert isinstance(loss, Tensor)  # without return_stats
    loss.backward()
    torch.save((loss.item(), own_TS.grad), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    _one_rank(rank=int(sys.argv[3]), ranks=int(sys.argv[1]), folder=sys.argv[2])
