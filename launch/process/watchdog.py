"""Detects a rank that has exited or stalled, reports which one and where the others wait, and ends the process.

A thread of each rank. Collectives wait silently, for as long as `launch.process.network` sets, and nothing else would
notice.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from transformers import TrainerCallback

from launch.common.messages import listed
from launch.process.device import uses_gpu
from launch.process.identity import ProcessIdentity, alive, stopped, this_process
from launch.process.network import wait_longer_than
from launch.process.ranks import on_all_ranks, rank, world_size
from launch.process.roll_call import Answer, RollCall, store_address

LOOK_SECONDS = 1.0
STORAGE_PATIENCE = 6  # times as long while a rank waits for storage
NOTICED_SECONDS = 3  # in which a launcher takes this process's exit code
# torch's, and this project's own
COLLECTIVES = ("distributed_c10d.py", "_functional_collectives.py", "collectives.py")
# between a collective and its caller
WRAPPERS = ("torch/", "smoothing/core/collectives.py", "deepspeed/comm/", "deepspeed/utils/", "typing_extensions.py")


class Beat(NamedTuple):
    """What this rank does since when, and whether that waits for storage."""

    doing: str
    storage: bool
    since: float

    def waited(self) -> float:
        return time.monotonic() - self.since


class Watchdog(TrainerCallback):
    """Watches while entered, and ends the process with `code` when a rank is lost.

    A rank that has made no progress for `limit` asks the others, and again every `limit`. If one is silent or no
    one is at its storage, the run stops; storage gets `STORAGE_PATIENCE` times as long. While it watches, collectives
    wait longer than it does, so that its report comes first.

    Args:
        limit: Seconds without progress on this rank after which it asks; 0 for never.
        code: The exit code.

    Collectives:
        One gather of objects on entering; none later.
    """

    def __init__(self, limit: float, code: int = 1):
        self.limit, self.code = limit, code
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._roll = RollCall(self._own_answer)
        self.beat("starting", storage=True)

    def beat(self, doing: str, storage: bool = False) -> None:
        """Note that this rank makes progress: what it does next, and whether that waits for storage."""
        self._beat = Beat(doing, storage, time.monotonic())

    def __enter__(self) -> "Watchdog":
        wait_longer_than(STORAGE_PATIENCE * self.limit)
        self._peers = peers(on_all_ranks(this_process), rank())
        self._roll.__enter__()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._roll.__exit__()

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
        gone: set[int] = set()
        silent: set[int] = set()
        beat, patience = self._beat, self.limit
        while not self._over.wait(LOOK_SECONDS):
            gone = self._stop_if_gone(gone)
            if self._beat is not beat:
                beat, patience, silent = self._beat, self.limit, set()
            if not self.limit or beat.waited() <= patience:
                continue
            answers = self._roll.ask()
            if answers is None and not self._over.wait(LOOK_SECONDS) and self._beat is beat:
                self._stop_cut_off(beat)  # not a run at its end, whose first rank has taken the store along
            if answers is None or self._over.is_set() or self._beat is not beat:
                continue
            silent_before, silent = silent, set(range(world_size())) - answers.keys()
            if silent & silent_before:  # asked twice: a rank may be kept from answering for a moment
                self._stop_stalled(beat, answers)
            elif not silent:
                if not self._waits_for_storage(beat, answers):
                    self._stop_stalled(beat, answers)
                patience += self.limit

    def _stop_if_gone(self, gone_before: set[int]) -> set[int]:
        """Return the ranks of this machine that are gone; end this process, with a report, if one was before.

        Seen twice, so that ranks which exit together do not report one another.
        """
        gone = {other for other, peer in self._peers.items() if not alive(peer.pid, peer.started)}
        if lost := gone & gone_before:
            if rank() == min({rank(), *self._peers} - lost):
                verb = "is" if len(lost) == 1 else "are"
                self._say(f"{listed('rank', lost)} {verb} gone during {self._beat.doing}")
            os._exit(self.code)
        return gone

    def _own_answer(self) -> Answer:
        return Answer(describe_thread(sys._current_frames().get(self._main)), self._beat.storage)

    def _waits_for_storage(self, beat: Beat, answers: dict[int, Answer]) -> bool:
        """Return whether some rank is at its storage, which may still take a while."""
        return any(answer.storage for answer in answers.values()) and beat.waited() <= STORAGE_PATIENCE * self.limit

    def _stop_stalled(self, beat: Beat, answers: dict[int, Answer]) -> NoReturn:
        """Report where each rank is, once for all ranks, and end this process."""
        if self._roll.speaks_for_all():
            waits = [answers[r].place if r in answers else self._silence(r) for r in range(world_size())]
            lines = "".join(f"\n  rank {other} {place}" for other, place in enumerate(waits))
            self._say(f"no progress for {beat.waited():.0f} s (--stall_timeout) during {beat.doing}:{lines}")
            self._end_stopped(self._peers.values())
        os._exit(self.code)

    def _stop_cut_off(self, beat: Beat) -> NoReturn:
        """Report that the store of the ranks is lost, and end this process. Neighbours that run find that out too."""
        halted = [other for other, peer in self._peers.items() if stopped(peer.pid, peer.started)]
        if 0 in halted:
            cause = "rank 0, whose process keeps the store, is stopped"
        elif rank() == 0 or 0 in self._peers:
            cause = "the process that keeps it on this machine hangs"
        else:
            cause = "the link from this machine to rank 0's is lost, or rank 0 is"
        lines = "".join(f"\n  rank {other} {self._silence(other)}" for other in halted)
        self._say(
            f"rank {rank()} on {socket.gethostname()}: no progress for {beat.waited():.0f} s (--stall_timeout) "
            f"during {beat.doing}, and the store of the ranks at {store_address()} does not answer: {cause}\n"
            f"  rank {rank()} {self._own_answer().place}{lines}"
        )
        self._end_stopped(self._peers.values())
        os._exit(self.code)

    def _silence(self, other: int) -> str:
        peer = self._peers.get(other)
        if peer is None:
            return "does not answer: stopped, or its node or the link to it is lost"
        reason = "stopped" if stopped(peer.pid, peer.started) else "it hangs"
        return f"does not answer: {reason} (process {peer.pid} of this machine)"

    @staticmethod
    def _end_stopped(processes: Iterable[ProcessIdentity]) -> None:
        """Have those of these processes killed that are stopped: they would ignore the launcher's SIGTERM for 30 s.

        Not before the launcher has seen this process's exit code, which it makes its own.
        """
        for peer in processes:
            if stopped(peer.pid, peer.started):
                words = f"sleep {NOTICED_SECONDS}; kill -KILL {peer.pid}"
                subprocess.Popen(["sh", "-c", words], stderr=subprocess.DEVNULL, start_new_session=True)

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
