"""Work that one rank of each machine does for all ranks there, while the others wait for as long as it takes."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from launch.common.errors import UserError
from launch.process.identity import ProcessIdentity, alive, this_process
from launch.process.ranks import on_all_ranks, rank

LOOK_SECONDS = 0.2
BEAT_SECONDS = 5.0
LOST_SECONDS = 120.0  # without a beat of a rank on another machine
_CALLS = itertools.count()


def once_a_machine(work: Callable[[], str], doing: str) -> str:
    """Return `work()` of this machine's first rank. What one machine's `work` raises, all ranks raise as `UserError`.

    The other ranks look into the store of the process group now and then, since a collective would give up on work
    that takes an hour. They raise if the rank that works exits, or if its machine is lost.

    Args:
        work: Called on the first rank of each machine.
        doing: What it does, for errors: "preparing the data".

    Collectives:
        One gather of objects before the work; none later.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    processes = on_all_ranks(this_process)
    first = {process.machine: number for number, process in reversed(list(enumerate(processes)))}
    workers = sorted(first.values())
    own = first[processes[rank()].machine]
    store = _store(next(_CALLS))
    failure: BaseException | None = None
    if rank() == own:
        with _beating(store):
            try:
                answer = [work(), None]
            except UserError as error:
                answer = [None, f"rank {rank()}: {error}" if rank() else str(error)]
            except BaseException as error:  # the others wait, so they are told first
                failure, answer = error, [None, f"rank {rank()} failed {doing}: {error!r}"]
        store.set(f"answer {rank()}", json.dumps(answer))
    if failure is not None:
        raise failure
    answers = _wait(store, workers, processes, doing)
    if errors := [error for _, error in answers.values() if error is not None]:
        raise UserError(errors[0])
    return answers[own][0]


def _store(call: int) -> dist.Store:
    return dist.PrefixStore(f"once {call}", _get_default_store().clone())  # type: ignore[attr-defined]


def _wait(store: dist.Store, workers: list[int], processes: Sequence[ProcessIdentity], doing: str) -> dict[int, list]:
    """Return the answer of each rank that works, or of the first one that failed."""
    answers: dict[int, list] = {}
    beats = {worker: (b"", time.monotonic()) for worker in workers}
    while True:
        for worker in workers:
            if worker not in answers and store.check([f"answer {worker}"]):
                answers[worker] = json.loads(store.get(f"answer {worker}"))
        if len(answers) == len(workers) or any(error is not None for _, error in answers.values()):
            return answers
        for worker in set(workers) - answers.keys():
            if processes[worker].machine == processes[rank()].machine:
                lost = not alive(processes[worker].pid, processes[worker].started)
            else:
                lost = _silent(store, worker, beats)
            if lost and not store.check([f"answer {worker}"]):
                raise UserError(f"rank {worker} is gone while {doing}; see its error above")
        time.sleep(LOOK_SECONDS)


def _silent(store: dist.Store, worker: int, beats: dict[int, tuple[bytes, float]]) -> bool:
    beat = store.get(f"beat {worker}") if store.check([f"beat {worker}"]) else b""
    if beat != beats[worker][0]:
        beats[worker] = beat, time.monotonic()
    return time.monotonic() - beats[worker][1] > LOST_SECONDS


@contextmanager
def _beating(store: dist.Store) -> Iterator[None]:
    """Tell the ranks of other machines every few seconds that this one lives."""
    over = threading.Event()
    own = store.clone()  # type: ignore[attr-defined]
    own.set_timeout(timedelta(seconds=BEAT_SECONDS))

    def beat() -> None:
        for number in itertools.count():
            own.set(f"beat {rank()}", str(number))
            if over.wait(BEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
