"""Start runs without importing anything again: `python -m tests.support.run_server` forks ranks that have it all.

Each line of its stdin is a start in JSON, the arguments of `launch`; the answer is the process id of a launcher,
forked as well, which does what deepspeed's does on one machine: it tells each rank its place in the environment, ends
the others once one has failed, and leaves an exit code. Nothing is initialised before the fork: each rank makes its
own process group, engine and random generators, as a fresh process does.

What a fork cannot show: ranks whose hash seeds differ, and what launch/sft.py does while a rank imports it. Starts by
deepspeed's launcher show it (`test_runs_agree.py`, `test_faults.py`). `tests.support.forked` is the other side.
"""

import gc
import json
import os
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from launch.process.exit import run_to_its_end
from launch.sft import main

LOOK_SECONDS = 0.02
PATIENCE_SECONDS = 30  # between SIGTERM and SIGKILL, as in deepspeed's launcher


def serve() -> None:
    gc.freeze()  # memory that no collection touches stays shared
    for line in sys.stdin:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # launchers that have ended; not earlier: tests ask for their state
                pass
        pid = os.fork()
        if pid == 0:
            launch(**json.loads(line))  # does not return
        print(pid, flush=True)


def launch(
    ranks: int | None, port: int, todo: list[list[str]], log: str, cwd: str, file_bytes: int | None, before: str
) -> None:
    """Start the ranks, wait for them, and end this process with its exit code in `log` + ".code".

    `ranks`: None for one process that nobody told that it is a rank. `before`: Python that each runs first.
    """
    server = os.getppid()
    os.setsid()
    os.chdir(cwd)
    _write_to(log)
    living = set()
    for rank in range(ranks or 1):
        pid = os.fork()
        if pid == 0:
            if ranks is not None:
                _take_place(rank, ranks, port)
            if file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
            _run(before, todo)
        living.add(pid)
    code = _first_failure(living, server)
    _end(living)
    Path(f"{log}.partial").write_text(str(code))
    Path(f"{log}.partial").rename(f"{log}.code")
    os._exit(0)


def _run(before: str, todo: list[list[str]]) -> None:
    """What a rank does, to the end of its process."""

    def every(_argv: list[str]) -> None:
        exec(before, {})
        run_all(todo)

    try:
        run_to_its_end(every, [])
    except SystemExit as end:  # of `--sanity`
        sys.stdout.flush()
        os._exit(end.code)


def run_all(todo: list[list[str]]) -> None:
    """Run `launch/sft.py`'s main with each list of arguments, one after another.

    Drawing a report takes as long as such a run: none is written unless asked for.
    """
    for arguments in todo:
        main(arguments if "--no_report" in arguments else [*arguments, "--no_report", "true"])
        gc.collect()


def _write_to(log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def _take_place(rank: int, ranks: int, port: int) -> None:
    """Set what deepspeed's launcher sets."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CROSS_RANK": 0, "CROSS_SIZE": 1}
    os.environ.update({name: str(value) for name, value in place.items()})


def _first_failure(living: set[int], server: int) -> int:
    """Wait until all ranks have ended, one has failed, or the server is gone; the exit code."""
    while living:
        pid, status = os.waitpid(-1, os.WNOHANG)
        living.discard(pid)
        if pid and (code := os.waitstatus_to_exitcode(status)):
            return code
        if os.getppid() != server:
            return 1
        time.sleep(0 if pid else LOOK_SECONDS)
    return 0


def _end(living: set[int]) -> None:
    """End the ranks that are left: SIGTERM, then SIGKILL to those that do not heed it."""
    for pid in living:
        os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + PATIENCE_SECONDS
    while living and time.monotonic() < until:
        living.discard(os.waitpid(-1, os.WNOHANG)[0])
        time.sleep(LOOK_SECONDS)
    for pid in living:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
