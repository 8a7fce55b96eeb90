"""The processes of a run: how many, which one this is, and values that all of them agree on."""

import logging
import os
from typing import Any

import torch
import torch.distributed as dist

from launch.common.errors import UserError
from launch.common.messages import printable
from launch.process.device import uses_gpu
from launch.process.network import choose_interface
from launch.process.place import take_place


def ensure_environment() -> None:
    """Make `python launch/sft.py` a run of one process, and share this machine's cores among its processes.

    Raises `UserError` if this is one of several processes and the launcher does not tell which.
    """
    take_place()
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    # deepspeed sets LOCAL_SIZE, all others LOCAL_WORLD_SIZE
    local_size = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    here = int(os.environ.setdefault("LOCAL_WORLD_SIZE", local_size or os.environ["WORLD_SIZE"]))
    choose_interface(one_machine=world_size() == 1 or (local_size is not None and here == world_size()))
    threads = int(os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // here))))
    torch.set_num_threads(threads)


def start_alone() -> None:
    """Start the process group of a run of one process, without listening for others.

    Libraries would make it listen on all addresses of the machine.
    """
    if world_size() == 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if uses_gpu() else "gloo", store=dist.HashStore(), rank=0, world_size=1)


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def say(text: str) -> None:
    """Print for the user, on rank 0."""
    if is_main():
        print(printable(text), flush=True)


def say_log(name: str) -> None:
    """Print what this library logs, on rank 0."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        handler = logging.Handler()
        handler.emit = lambda record: say(record.getMessage())  # type: ignore[method-assign]
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def leave() -> None:
    """Destroy the process group, so that ranks which exit later print no warnings."""
    if dist.is_initialized():
        dist.destroy_process_group()


def from_main(compute):
    """Return `compute()` of rank 0 on every rank. An error there is raised on all ranks, as a `UserError`.

    Collectives: one broadcast of objects.
    """
    box, failure = [None, None], None
    if is_main():
        try:
            box[0] = compute()
        except UserError as error:
            box[1] = str(error)
        except Exception as error:  # the others wait in the broadcast, so they are told first
            failure, box[1] = error, f"rank 0 failed: {error}"
    if dist.is_initialized() and dist.get_world_size() > 1:
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
        dist.broadcast_object_list(box, src=0, device=device)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def on_all_ranks(compute) -> list:
    """Return `[compute() of rank 0, of rank 1, ...]` on every rank. What one raises, all raise, as a `UserError`.

    Collectives: one gather of objects.
    """
    own: tuple[Any, str | None]
    try:
        own = (compute(), None)
    except UserError as error:
        own = (None, str(error))
    except Exception as error:
        own = (None, f"rank {rank()} failed: {error}")
    everybody = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        everybody = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, own)
    if failed := [error for _, error in everybody if error is not None]:
        raise UserError(failed[0])
    return [value for value, _ in everybody]
