"""What the study ran on, in a line."""

import os
import platform
from importlib.metadata import version

import torch


def hardware() -> str:
    """Return the device, the machine's cores, and the versions of what computes."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores, {_processor()}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed"))
    return f"{device}, {versions}, Python {platform.python_version()}"


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def has_gpu() -> bool:
    return torch.cuda.is_available()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
