"""Long-lived gloo ranks on the CPU that run one function each, under a hard time limit.

    pool = Ranks(3)
    losses = pool.run(fn, case)          # [fn(case) on rank 0, on rank 1, on rank 2]; raises what they raise
    outcomes = pool.attempt(fn, case)    # the same, with each rank's exception as a value

`fn` is a top-level function of an importable module; it finds its rank in `torch.distributed`, which is
initialised. Ranks live until the pool is closed: importing torch once a process is what keeps the tests fast.
A rank that dies or overruns costs the pool its processes; the next call starts new ones.
"""

import atexit
import contextlib
import functools
import multiprocessing
import os
import pickle
import shutil
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TIME_LIMIT = 30.0  # seconds for one call, start of the ranks included
COLLECTIVE_LIMIT = timedelta(seconds=10)  # a rank left alone in a collective sees an error after this

# Forking from a server that has imported torch makes a rank in 0.1 s instead of 2 s.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["torch", "torch.distributed"])


class StillRunning(AssertionError):
    """Some ranks did not finish within the time limit."""


@dataclass
class Outcome:
    """What one rank made of a call: a value, or the error's type name, text and traceback."""

    value: Any = None
    error: str | None = None
    message: str = ""
    trace: str = ""


class Ranks:
    def __init__(self, size: int):
        self.size = size
        self._processes = []
        self._pipes = []
        self._folder = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __repr__(self):
        return f"Ranks({self.size})"

    def run(self, fn, *args, time_limit: float = TIME_LIMIT, **kwargs) -> list:
        """`fn(*args, **kwargs)` on every rank: the values in rank order. Raises if one raised or died."""
        outcomes = self.attempt(fn, *args, time_limit=time_limit, **kwargs)
        failed = [f"rank {rank}: {o.trace or o.message}" for rank, o in enumerate(outcomes) if o.error]
        if failed:
            self.close(kill=True)  # the ranks may be out of step; the next test is to start clean
            raise AssertionError("\n".join(failed))
        return [o.value for o in outcomes]

    def attempt(self, fn, *args, time_limit: float = TIME_LIMIT, **kwargs) -> list[Outcome]:
        """As `run`, but exceptions come back as `Outcome.error`; the death of a rank as the error "died"."""
        if not self._processes:
            self._start()
        # Plain pickle: torch's own reducers would pass file descriptors to shared memory.
        request = pickle.dumps((fn, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(request)
        outcomes = self._collect(time.monotonic() + time_limit)
        running = [rank for rank in range(self.size) if rank not in outcomes]
        if running or any(o.error == "died" for o in outcomes.values()):
            self.close(kill=True)
        if running:
            done = {rank: o.error or "finished" for rank, o in sorted(outcomes.items())}
            raise StillRunning(f"ranks {running} still running after {time_limit} s; others: {done}")
        return [outcomes[rank] for rank in range(self.size)]

    def close(self, kill: bool = False):
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            if kill:
                process.kill()
            else:
                _hang_up(pipe)
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start(self):
        self._folder = tempfile.mkdtemp(prefix="ranks-")
        for rank in range(self.size):
            here, there = _PROCESSES.Pipe()
            process = _PROCESSES.Process(
                target=_serve, args=(rank, self.size, f"{self._folder}/store", there), daemon=True
            )
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def _collect(self, deadline: float) -> dict[int, Outcome]:
        waiting = dict(zip(self._pipes, range(self.size), strict=True))
        outcomes = {}
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), timeout=left):
                rank = waiting.pop(pipe)
                try:
                    outcomes[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(1)
                    code = self._processes[rank].exitcode
                    outcomes[rank] = Outcome(error="died", message=f"process ended with exit code {code}")
        return outcomes


def _hang_up(pipe):
    with contextlib.suppress(OSError):  # that rank may be gone already
        pipe.send_bytes(b"")


def _serve(rank: int, size: int, store: str, pipe):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=COLLECTIVE_LIMIT
    )
    while request := pipe.recv_bytes():
        while _fresh_groups:  # of the call before, which has ended on all ranks
            dist.destroy_process_group(_fresh_groups.pop())
        try:
            fn, args, kwargs = pickle.loads(request)
            answer = pickle.dumps(Outcome(fn(*args, **kwargs)))
        except Exception as error:
            answer = pickle.dumps(
                Outcome(error=type(error).__name__, message=str(error), trace=traceback.format_exc())
            )
        pipe.send_bytes(answer)
    dist.destroy_process_group()


@functools.cache
def pool(size: int) -> Ranks:
    """The one pool of this size that all test files share."""
    ranks = Ranks(size)
    atexit.register(ranks.close)
    return ranks


_fresh_groups: list[dist.ProcessGroup] = []  # each has threads that wake up a hundred times a second


def fresh_group(ranks: list[int] | None = None):
    """A new group of these ranks, or all, for this call alone. Every rank must call this."""
    ranks = list(range(dist.get_world_size())) if ranks is None else ranks
    group = dist.new_group(ranks, timeout=COLLECTIVE_LIMIT)
    if dist.get_rank() in ranks:
        _fresh_groups.append(group)
    return group


class Collectives(TorchDispatchMode):
    """Records every collective issued under it: `seen` is a list of (operation, bytes this rank sends)."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.name():
            # c10d gathers take (output, input, ...); the reductions take what they send first.
            sent = args[1] if "gather" in func.name() and func.namespace == "c10d" else args[0]
            tensors = [leaf for leaf in tree_leaves(sent) if isinstance(leaf, torch.Tensor)]
            self.seen.append((func.name(), sum(t.nbytes for t in tensors)))
        return func(*args, **(kwargs or {}))


class Allocations(TorchDispatchMode):
    """Records the bytes of every new storage that an operation returns under it."""

    def __init__(self):
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in given:
                self.bytes.append(leaf.untyped_storage().nbytes())
        return result
