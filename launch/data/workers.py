"""Processes that work on batches, with results in the order of the batches; the death of one costs one item."""

import gc
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from ctypes import CDLL
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from launch.common.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
MEMORY = 4 << 30  # bytes that a worker may take beyond what it starts with
AHEAD = 4  # batches that may be finished while an earlier one is not, for each worker
PR_SET_PDEATHSIG = 1
_FORK = multiprocessing.get_context("fork")


class Workers(Generic[Item, Result]):
    """Calls a function on batches of items in forked processes.

    A worker that dies (a panic in a library, no memory) loses nothing: its batch is done again one item at a time,
    and the item on which a worker dies again is given to `lost` instead.

    Args:
        count: Processes; 0 does the work in this one, where nothing protects it.
        call: Makes a result of a batch. Workers are forked, so it may hold anything.
        lost: Makes a result of an item that ends the process that works on it, and of the reason.
    """

    def __init__(self, count: int, call: Callable[[list[Item]], Result], lost: Callable[[Item, str], Result]) -> None:
        self._most, self._call, self._lost = count, call, lost
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def map(self, batches: Iterable[list[Item]]) -> Iterator[Result]:
        """Yield the results of batches in their order; more than one of a batch on which a worker died.

        What `call` raises is raised, in the order of the batches too, and what the iteration over `batches` raises
        after the results of all batches before.
        """
        if self._most == 0:
            yield from map(self._call, batches)
            return
        self._finish()  # of an earlier call whose results were not all wanted
        done: dict[int, list[Result | Exception]] = {}
        source, failure, following, number, over = iter(batches), None, 0, 0, False
        while not over or following < number:
            if following in done:
                yield from _values(done.pop(following))
                following += 1
            elif not over and number < following + AHEAD * self._most and (worker := self._idle()):
                try:
                    worker.send(number, next(source))
                    number += 1
                except StopIteration:
                    over = True
                except Exception as error:
                    over, failure = True, error
            else:
                self._collect(done)
        if failure is not None:
            raise failure

    def _idle(self) -> "_Worker | None":
        """Return a worker without a batch, a new one if there may be more."""
        for worker in self._workers:
            if worker.batch is None:
                return worker
        return self._start() if len(self._workers) < self._most else None

    def _start(self) -> "_Worker":
        worker = _Worker(self._call, [other.pipe for other in self._workers])
        self._workers.append(worker)
        return worker

    def _collect(self, done: dict) -> None:
        """Wait until a worker has a result, and take it."""
        busy = [worker for worker in self._workers if worker.batch is not None]
        ready = wait([worker.pipe for worker in busy])
        for worker in busy:
            if worker.pipe not in ready:
                continue
            number, batch = worker.number, worker.batch or []
            try:
                done[number] = [worker.receive()]
            except _Died:
                self._workers.remove(worker)
                done[number] = list(self._one_by_one(batch))

    def _one_by_one(self, batch: Sequence[Item]) -> Iterator[Result | Exception]:
        worker = None
        for item in batch:
            worker = worker or self._start()
            try:
                worker.send(0, [item])
                yield worker.receive()
            except _Died as death:
                self._workers.remove(worker)
                worker = None
                yield self._lost(item, str(death))

    def _finish(self) -> None:
        while any(worker.batch is not None for worker in self._workers):
            self._collect({})


def _values(results: list) -> Iterator:
    for result in results:
        if isinstance(result, Exception):
            raise result
        yield result


class WorkerError(Exception):
    """An error in a worker that is none of the data's; its text is the traceback there."""


class _Died(Exception):
    """A worker's process ended by itself; why, as far as its exit code says."""


class _Worker:
    """One process; `batch` is what it works on, None while it waits."""

    def __init__(self, call: Callable, others: list[Connection]) -> None:
        self.pipe, there = _FORK.Pipe()
        self.number = 0
        self.batch: list | None = None
        gc.collect()
        gc.freeze()  # a collection in the worker would write into every object, and so copy all memory
        try:
            self._process = _FORK.Process(
                target=_serve, args=(call, there, [self.pipe, *others], os.getpid()), daemon=True
            )
            self._process.start()
        finally:
            gc.unfreeze()
        there.close()

    def send(self, number: int, batch: list) -> None:
        self.number, self.batch = number, batch
        with suppress(OSError):  # of a dead process: `receive` says so
            self.pipe.send(batch)

    def receive(self) -> Any:
        """Return the result, or what the call raised. Raises _Died."""
        try:
            result = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise _Died(_why(self._process.exitcode)) from None
        self.batch = None
        return result

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _why(code: int | None) -> str:
    if code is not None and code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _serve(call: Callable, pipe: Connection, others: list[Connection], parent: int) -> None:
    """Work until the pipe is closed."""
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _limit_memory()
    for other in others:
        other.close()
    gc.disable()  # rows make thousands of tuples each, which live for no longer than the batch
    while True:
        try:
            batch = pipe.recv()
        except EOFError:
            return
        try:
            result = call(batch)
        except UserError as error:
            result = error
        except Exception:
            result = WorkerError(traceback.format_exc())
        pipe.send(result)
        gc.collect()


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)


def _limit_memory() -> None:
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = held + MEMORY if hard == resource.RLIM_INFINITY else min(held + MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
