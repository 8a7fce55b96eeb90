"""The device that a run's tensors are on, and the most memory it has held."""

import resource

import torch

from launch.common.messages import counted
from launch.common.units import GIB


def uses_gpu() -> bool:
    """Return whether that is a GPU: DeepSpeed decides, by what is installed or by `DS_ACCELERATOR=cpu`."""
    from deepspeed.accelerator import get_accelerator  # slow to import, and not needed to read data

    return get_accelerator().device_name() == "cuda"


def device_problem(local_rank: int) -> str | None:
    """Return why a rank has no GPU of its own where ranks are on GPUs, or None."""
    if not uses_gpu() or local_rank < torch.cuda.device_count():
        return None
    seen = counted(torch.cuda.device_count(), "GPU")
    return (
        f"LOCAL_RANK is {local_rank}, and this process sees {seen}: start as many ranks on a machine as it has GPUs, "
        "and let each see them all (under SLURM --gpus-per-node, not --gpus-per-task)"
    )


def peak_memory_gib() -> float:
    """Return the most memory this process has held: allocated on the device, or resident on a CPU."""
    if uses_gpu():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
