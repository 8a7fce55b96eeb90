"""Stops this rank as on SIGTERM once the processes that started it have exited.

`deepspeed` on one node does not pass SIGTERM on, and its ranks would train on with no process to end them. Which
processes they are is found out before anything slow is imported; afterwards they may have exited already.
"""

import base64
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import psutil

from launch.process.identity import alive, start_time
from launch.process.place import is_rank

Launchers = list[tuple[int, int | None]]  # process id and start time
LOOK_SECONDS = 1.0


def follow_launcher() -> None:
    """Watch the launcher from now on, in a thread, if this process was started as a rank."""
    if not is_rank(psutil.Process().environ()):  # as it was when this process began
        return
    launchers, orphan = _launchers()
    threading.Thread(target=_follow, args=(launchers, orphan), daemon=True).start()


def _follow(launchers: Launchers, orphan: bool) -> None:
    while not orphan and all(alive(*launcher) for launcher in launchers):
        time.sleep(LOOK_SECONDS)
    if os.environ.get("RANK") == "0":
        print("the launcher is gone: stopping as on SIGTERM", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


class Launch(NamedTuple):
    """The process with which `deepspeed` starts the ranks of one node, which all of them descend from."""

    pid: int
    started: int | None
    port_chosen: bool


def one_node_launch() -> Launch | None:
    """Return the launch that this rank belongs to, if it is `deepspeed`'s on one node and still runs."""
    parents = psutil.Process().parents()
    for process, above in zip(parents, [*parents, None][1:], strict=True):
        words = _words(process)
        if _starts_one_node(words):
            return Launch(process.pid, start_time(process.pid), _chooses_port(words, _words(above)))
    return None


def _chooses_port(words: list[str], above: list[str]) -> bool:
    """Return whether the user named the port: `deepspeed` always names one to the process that starts the ranks."""
    if not _is_deepspeed(above):
        return _names_port(words)
    return _names_port(list(takewhile(lambda word: not word.endswith(".py"), above)))


def _names_port(words: list[str]) -> bool:
    return any(word.startswith("--master_p") for word in words)


def _words(process: psutil.Process | None) -> list[str]:
    with suppress(psutil.Error):
        return [] if process is None else process.cmdline()
    return []


def _is_deepspeed(words: list[str]) -> bool:
    return any(Path(word).name == "deepspeed" or "deepspeed.launcher" in word for word in words[1:4])


def _launchers() -> tuple[Launchers, bool]:
    """Return the process that started this one and deepspeed's above it, and whether the latter has exited."""
    found: Launchers = []
    local = False
    for process in psutil.Process().parents():
        words = _words(process)
        if found and not _is_deepspeed(words):
            break
        found.append((process.pid, start_time(process.pid)))
        local = local or _starts_one_node(words)
    return found, local and len(found) == 1


def _starts_one_node(words: list[str]) -> bool:
    """Return whether this is the process with which `deepspeed` starts the ranks of a node, and the only node."""
    for word in words:
        if word.startswith("--world_info="):
            with suppress(ValueError):
                return list(json.loads(base64.urlsafe_b64decode(word.partition("=")[2]))) == ["localhost"]
    return False
