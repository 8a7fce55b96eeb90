"""Asks all ranks, through their store, whether they live and what each is doing; and answers the others.

A rank answers from a thread, so also while it waits in a collective or for storage. The store is in rank 0's process
or the launcher's: on a node that is cut off from it no question is answered, which says nothing about the neighbours.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from launch.process.ranks import rank, world_size

LOOK_SECONDS = 1.0
ANSWER_SECONDS = 5.0
ROUND = "round"
T = TypeVar("T")


class Answer(NamedTuple):
    """What a rank is doing: where its main thread is, and whether it reads or writes storage."""

    place: str
    storage: bool


class RollCall:
    """Answers from when it is entered until it is left.

    Args:
        own: Returns this rank's answer; called in other threads than the main one.
    """

    def __init__(self, own: Callable[[], Answer]):
        self._own = own
        self._over = threading.Event()

    def __enter__(self) -> "RollCall":
        self._asking = _store_for_one_thread()
        self._answering = threading.Thread(target=self._answer, args=(_store_for_one_thread(),), daemon=True)
        self._answering.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._answering.join(ANSWER_SECONDS)  # Python must not end while it is in the store's C++: that aborts

    def ask(self) -> dict[int, Answer] | None:
        """Return the answer of each rank that gives one in time; None if the store itself does not answer."""
        if self._asking is None:
            return {rank(): self._own()}
        return _in_time(self._ask)

    def speaks_for_all(self) -> bool:
        """Return whether this rank is the first to ask this, or cannot know: one rank is to report for all."""
        if self._asking is None:
            return True
        return _in_time(lambda: self._asking.add("reporting", 1) == 1) is not False

    def _ask(self) -> dict[int, Answer]:
        self._asking.set_timeout(timedelta(seconds=ANSWER_SECONDS))
        number = self._asking.add(ROUND, 1)
        answers = {rank(): self._own()}
        until = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < until and len(answers) < world_size():
            for other in set(range(world_size())) - answers.keys():
                if self._asking.check([str(other)]):
                    answered, *answer = json.loads(self._asking.get(str(other)))
                    if answered >= number:  # several may ask at once, and one answer is for all of them
                        answers[other] = Answer(*answer)
            time.sleep(0.1)
        return answers

    def _answer(self, store: dist.Store | None) -> None:
        answered = 0
        with suppress(RuntimeError):  # the store is lost
            while store is not None and not self._over.wait(LOOK_SECONDS):
                if store.check([ROUND]) and (number := int(store.get(ROUND))) > answered:
                    store.set(str(rank()), json.dumps([number, *self._own()]))
                    answered = number


def store_address() -> str:
    """Return where the store of the ranks is, for an error message."""
    return f"{os.environ.get('MASTER_ADDR', 'rank 0')}:{os.environ.get('MASTER_PORT', '?')}"


def _store_for_one_thread() -> dist.Store | None:
    """Return a connection to the store of the ranks; None if there is only one rank."""
    if not dist.is_initialized() or world_size() == 1:
        return None
    return dist.PrefixStore("watchdog", _get_default_store().clone())  # type: ignore[attr-defined]


def _in_time(question: Callable[[], T]) -> T | None:
    """Return what the store answers; None if it does not. In a thread, since a lost store may block for ever."""
    answers: list[T] = []

    def run() -> None:
        with suppress(RuntimeError):
            answers.append(question())

    asking = threading.Thread(target=run, daemon=True)
    asking.start()
    asking.join(2 * ANSWER_SECONDS)
    return answers[0] if answers else None
