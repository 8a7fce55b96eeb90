"""How tests start processes: the deepspeed launcher, a free port, the environment."""

import contextlib
import os
import random
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def launcher(ranks: int) -> list[str]:
    """The deepspeed launcher for so many ranks of this machine; a script and its arguments follow."""
    return [str(Path(sys.executable).with_name("deepspeed")), f"--num_gpus={ranks}", f"--master_port={free_port()}"]


def free_port() -> int:
    """A port of this machine that nobody listens on, below those that connections are given."""
    while True:
        port = random.randint(10000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def environment() -> dict[str, str]:
    """One thread a rank, and this Python first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
