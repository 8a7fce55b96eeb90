"""Which process a rank is: host names and process ids repeat across containers, and process ids over time."""

import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NAMESPACE = Path("/proc/self/ns/pid")
STATE, START_TIME = 0, 19  # fields of /proc/PID/stat after the name


class ProcessIdentity(NamedTuple):
    """`machine`: processes of one machine see each other's process ids. `started`: clock ticks since the boot."""

    machine: str
    pid: int
    started: int | None


def this_process() -> ProcessIdentity:
    return ProcessIdentity(machine(), os.getpid(), start_time(os.getpid()))


def machine() -> str:
    """Return the boot of the kernel and the namespace of process ids; the host name where /proc does not say."""
    try:
        return f"{BOOT_ID.read_text().strip()} {os.readlink(NAMESPACE)}"
    except OSError:
        return socket.gethostname()


def start_time(pid: int) -> int | None:
    """Return when a process of this machine started; None if it has ended or cannot be read."""
    with suppress(OSError):
        return int(_stat(pid)[START_TIME])
    return None


def alive(pid: int, started: int | None = None) -> bool:
    """Return whether this process of this machine still runs; not a zombie, nor a later one with the same id."""
    try:
        stat = _stat(pid)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return stat[STATE] not in "ZX" and started in (None, int(stat[START_TIME]))


def stopped(pid: int, started: int | None = None) -> bool:
    """Return whether this process of this machine is stopped, as by SIGSTOP or Ctrl-Z."""
    with suppress(OSError):
        stat = _stat(pid)
        return stat[STATE] == "T" and started in (None, int(stat[START_TIME]))
    return False


def _stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
