"""The processes of a run: one when nobody started more, and what they must say alike."""

import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist

from launch.errors import UserError

RUNS = Path("runs")


def ensure_environment() -> None:
    """Make `python launch/sft.py` a run of one process, and share this machine's cores among its processes."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()}, MASTER_ADDR="127.0.0.1")
    # the launcher says LOCAL_SIZE where torchrun and accelerate say LOCAL_WORLD_SIZE
    here = int(os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])))
    threads = int(os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // here))))
    if not torch.cuda.is_available():
        torch.set_num_threads(threads)


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """To the user, once."""
    if is_main():
        print(text, flush=True)


def leave() -> None:
    """Take the process group down, so that no rank outlives another with a warning."""
    if dist.is_initialized():
        dist.destroy_process_group()


def from_main(compute):
    """`compute()` on rank 0, its value everywhere. What it raises there, every rank raises as a `UserError`."""
    box, failure = [None, None], None
    if is_main():
        try:
            box[0] = compute()
        except UserError as fault:
            box[1] = str(fault)
        except Exception as fault:  # the others wait in the broadcast: tell them first
            failure, box[1] = fault, f"rank 0 failed: {fault}"
    if dist.is_initialized() and dist.get_world_size() > 1:
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
        dist.broadcast_object_list(box, src=0, device=device)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def claim_output_dir(wanted: str | None, resuming: bool) -> str:
    """The directory of this run, made on rank 0: `wanted`, or the next free number in `runs/`.

    Raises `UserError` if `wanted` already holds files: a finished run is never overwritten in silence.
    """
    return from_main(lambda: _next_numbered() if wanted is None else _claim(Path(wanted), resuming))


def _claim(path: Path, resuming: bool) -> str:
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path} is a file; name a directory")
    if path.exists() and any(path.iterdir()) and not resuming:
        raise UserError(f"--output_dir {path} already holds a run; name another directory, or move this one away")
    if (path / "model").exists():
        raise UserError(f"--output_dir {path} already holds an exported model; move {path / 'model'} away to resume")
    path.mkdir(parents=True, exist_ok=True)
    return str(path)


def _next_numbered() -> str:
    RUNS.mkdir(exist_ok=True)
    numbers = [int(entry.name) for entry in RUNS.iterdir() if entry.name.isdigit()]
    number = max(numbers, default=0) + 1
    while True:
        try:
            (RUNS / f"{number:04d}").mkdir()
            return str(RUNS / f"{number:04d}")
        except FileExistsError:  # another run took it meanwhile
            number += 1
