"""Starts of runs whose ranks are forked from a server that has imported everything (`tests.support.run_server`).

A start takes a tenth of a second instead of some ten seconds of a core for each process.
"""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.support.processes import ROOT, environment, free_port

LOOK_SECONDS = 0.05


class ForkedRuns(psutil.Process):
    """One start: the process of its launcher, with `poll` and `returncode` as those of `psutil.Popen`.

    `todo`: the arguments of each run, one after another in the same processes. `ranks`: None for one process that no
    launcher started. `file_bytes`: no file may grow larger, which fails as a full disk does. `before`: Python that
    each rank runs first.
    """

    def __init__(
        self,
        ranks: int | None,
        todo: list[list[str]],
        log: Path,
        cwd: Path | None = None,
        file_bytes: int | None = None,
        before: str = "",
    ):
        self._code = Path(f"{log}.code")
        self._code.unlink(missing_ok=True)
        start = {"ranks": ranks, "todo": todo, "log": str(log), "cwd": str(cwd or Path.cwd()), "port": free_port()}
        super().__init__(_ask(start | {"file_bytes": file_bytes, "before": before}))

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        try:
            running = self.is_running() and self.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            running = False
        if running:
            return None
        return int(self._code.read_text()) if self._code.exists() else -signal.SIGKILL

    returncode = property(poll)

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None if it still runs after so long."""
        until = time.monotonic() + seconds
        while (code := self.poll()) is None and time.monotonic() < until:
            time.sleep(LOOK_SECONDS)
        return code

    def end(self) -> None:
        """Kill what still runs: the launcher and its ranks, which are a process group."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def _ask(start: dict) -> int:
    """Have the server make a start; the process id of its launcher."""
    server = _server()
    server.stdin.write(json.dumps(start) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, f"the server of runs has ended with {server.wait()}"
    return int(answer)


@functools.cache
def _server() -> subprocess.Popen:
    """The one server of this process, which ends when this process does, and its runs with it."""
    command = [sys.executable, "-u", "-m", "tests.support.run_server"]
    server = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    )
    atexit.register(server.stdin.close)
    return server
