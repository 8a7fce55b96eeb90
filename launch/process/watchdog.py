"""Detects a rank that has exited or stalled, reports which one and where the others wait, and ends the process.

A thread of each rank. Collectives wait silently, for as long as `launch.process.network` sets, and nothing else would
notice.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from transformers import TrainerCallback

from launch.process.device import uses_gpu
from launch.process.identity import ProcessIdentity, alive, this_process
from launch.process.network import wait_longer_than
from launch.process.ranks import on_all_ranks, rank, world_size

LOOK_SECONDS = 1.0
ANSWER_SECONDS = 5.0
STORAGE_PATIENCE = 6  # times as long while waiting for storage
# torch's, and this project's own
COLLECTIVES = ("distributed_c10d.py", "_functional_collectives.py", "collectives.py")
# between a collective and its caller
WRAPPERS = ("torch/", "smoothing/core/collectives.py", "deepspeed/comm/", "deepspeed/utils/", "typing_extensions.py")


class Watchdog(TrainerCallback):
    """Watches while entered, and ends the process with `code` when a rank is lost.

    While it watches, collectives wait longer than it does, so that its report comes first.

    Args:
        limit: Seconds without progress on this rank after which the run stops; 0 for never.
        code: The exit code.

    Collectives:
        One gather of objects on entering; none later.
    """

    def __init__(self, limit: float, code: int = 1):
        self.limit, self.code = limit, code
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._first_to_ask = True  # until the store answers; the store itself may be lost
        self.beat("starting", storage=True)

    def beat(self, doing: str, storage: bool = False) -> None:
        """Note that this rank makes progress: what it does next, and whether that waits for storage."""
        self._doing, self._since = doing, time.monotonic()
        self._patience = self.limit * (STORAGE_PATIENCE if storage else 1)

    def __enter__(self) -> "Watchdog":
        wait_longer_than(STORAGE_PATIENCE * self.limit)
        self._peers = peers(on_all_ranks(this_process), rank())
        self._store = self._own_store()
        self._answering = threading.Thread(target=self._answer, args=(self._own_store(),), daemon=True)
        self._answering.start()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._answering.join(ANSWER_SECONDS)  # Python must not end while it is in the store's C++: that aborts

    def on_step_begin(self, args, state, control, **kwargs):
        self.beat(f"step {state.global_step + 1}")

    def on_substep_end(self, args, state, control, **kwargs):
        self.beat(f"step {state.global_step + 1}")

    def on_step_end(self, args, state, control, **kwargs):
        self.beat(f"the end of step {state.global_step}")

    def on_prediction_step(self, args, state, control, **kwargs):
        self.beat(f"evaluation after step {state.global_step}")

    def on_save(self, args, state, control, **kwargs):
        self.beat(f"the end of step {state.global_step}")

    def _watch(self) -> None:
        missed: set[int] = set()
        while not self._over.wait(LOOK_SECONDS):
            gone = {r for r, peer in self._peers.items() if not alive(peer.pid, peer.started)}
            if lost := gone & missed:  # seen twice, so that ranks which exit together do not report one another
                if rank() == min({rank(), *self._peers} - lost):
                    self._say(f"rank(s) {sorted(lost)} are gone during {self._doing}")
                os._exit(self.code)
            missed = gone
            if self.limit and time.monotonic() - self._since > self._patience:
                self._stalled()

    def _stalled(self) -> None:
        here = describe_thread(sys._current_frames().get(self._main))
        answers = {rank(): here}
        if self._store is not None:
            asking = threading.Thread(target=self._ask, args=(here, answers), daemon=True)
            asking.start()
            asking.join(2 * ANSWER_SECONDS)
        if self._first_to_ask:
            silent = "does not answer: stopped, or its node is lost"
            waits = "".join(f"\n  rank {other} {answers.get(other, silent)}" for other in range(world_size()))
            waited = time.monotonic() - self._since
            self._say(f"no progress for {waited:.0f} s (--stall_timeout) during {self._doing}:{waits}")
            self._kill(peer for other, peer in self._peers.items() if other not in answers)
        os._exit(self.code)

    @staticmethod
    def _kill(silent: Iterable[ProcessIdentity]) -> None:
        """End ranks of this machine that do not answer; they would ignore the launcher's SIGTERM for 30 seconds."""
        for peer in silent:
            if alive(peer.pid, peer.started):
                with suppress(ProcessLookupError):
                    os.kill(peer.pid, signal.SIGKILL)

    def _own_store(self) -> dist.Store | None:
        """Return a connection to the store of the ranks, for one thread; None if there is only one rank."""
        if not dist.is_initialized() or world_size() == 1:
            return None
        return dist.PrefixStore("watchdog", _get_default_store().clone())  # type: ignore[attr-defined]

    def _answer(self, store: dist.Store | None) -> None:
        """Report where this rank is once another asks. In a thread of its own, since the store may block."""
        with suppress(RuntimeError):
            while not self._over.wait(LOOK_SECONDS):
                if store is not None and store.check(["asking"]):
                    store.set(str(rank()), describe_thread(sys._current_frames().get(self._main)))
                    return

    def _ask(self, here: str, answers: dict[int, str]) -> None:
        self._store.set_timeout(timedelta(seconds=ANSWER_SECONDS))
        self._first_to_ask = self._store.add("asking", 1) == 1
        self._store.set(str(rank()), here)
        until = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < until and len(answers) < world_size():
            for other in set(range(world_size())) - answers.keys():
                if self._store.check([str(other)]):
                    answers[other] = self._store.get(str(other)).decode()
            time.sleep(0.1)

    @staticmethod
    def _say(text: str) -> None:
        print(f"error: {text}\nThe run stops; the same command resumes from its last checkpoint.", file=sys.stderr)
        sys.stderr.flush()


def peers(processes: Sequence[ProcessIdentity], own_rank: int) -> dict[int, ProcessIdentity]:
    """Return the other ranks whose processes this one can see: those of its machine, by rank."""
    here = processes[own_rank].machine
    return {other: peer for other, peer in enumerate(processes) if peer.machine == here and other != own_rank}


def describe_thread(frame) -> str:
    """Return what a thread is doing: the collective it waits in and the caller, or its innermost line."""
    collective, innermost = None, frame
    while frame is not None:
        inside = Path(frame.f_code.co_filename)
        if collective is not None and not any(f"/{package}" in str(inside) for package in WRAPPERS):
            return f"waits in {collective}, called at {_short(inside)}:{frame.f_lineno}"
        if inside.name in COLLECTIVES and frame.f_code.co_name != "wrapper":
            collective = frame.f_code.co_name
        frame = frame.f_back
    if innermost is None:
        return "has no main thread"
    code = innermost.f_code
    place = f"{code.co_name} at {_short(Path(code.co_filename))}:{innermost.f_lineno}"
    if uses_gpu():  # where collectives are launched asynchronously, and the wait is elsewhere
        return f"begins no collective, but is in {place}; its device may be in one that was begun before"
    return f"is in no collective, but in {place}"


def _short(path: Path) -> str:
    return "/".join(path.parts[-3:])
