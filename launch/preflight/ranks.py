"""Processes on this machine, one for each tensor-parallel rank, for checks that need more than one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

TIME_LIMIT = 300  # seconds


def run_ranks(module: str, ranks: int, folder: str) -> None:
    """Run `python -m module RANKS FOLDER RANK` for every rank, on the CPU; end the others as soon as one fails.

    Raises `RuntimeError` with the ranks' error output if one of them fails.
    """
    env = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", module, str(ranks), folder]
    logs = [Path(folder) / f"{rank}.log" for rank in range(ranks)]
    started = []
    for rank, log in enumerate(logs):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        with log.open("w") as file:
            started.append(subprocess.Popen([*command, str(rank)], env=env | place, stdout=file, stderr=file))
    deadline = time.monotonic() + TIME_LIMIT
    while any(process.poll() is None for process in started):
        if any(process.poll() for process in started) or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    states = [process.poll() for process in started]
    for process in started:
        process.kill()
        process.wait()
    if any(state != 0 for state in states):
        failed = [log.read_text(errors="replace") for log, state in zip(logs, states, strict=True) if state]
        raise RuntimeError("\n".join(failed) or f"no result within {TIME_LIMIT} s")


def join(rank: int, ranks: int, folder: str) -> None:
    """Start the process group of these ranks."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
