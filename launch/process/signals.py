"""SIGTERM and Ctrl-C: noted when they come, and agreed on by all ranks between steps."""

import os
import signal

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run ended on a signal, with a checkpoint. `code` is the process's exit code."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.code = 128 + number


class EvaluationCut(Exception):
    """A signal came during an evaluation, which may take longer than the launcher waits before it kills."""


class StopOnSignal:
    """Listens for signals while entered, and agrees on them with the other ranks.

    A second Ctrl-C ends the process at once. The deepspeed launcher passes a signal on to one rank after another and
    gives each half a minute, so a step and its checkpoint have that long.

    Attributes:
        signal: The first signal that any rank had seen when `agree` was last called, the same on all ranks; 0 for
            none.
    """

    def __init__(self):
        self.signal = 0
        self._seen = 0  # on this rank, at any moment, also while the ranks are agreeing
        self._group = None

    def __enter__(self) -> "StopOnSignal":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self._seen == number == signal.SIGINT:
            os._exit(128 + number)
        self._seen = self._seen or number

    def connect(self) -> None:
        """Make the group that the ranks agree in. Collectives: one new group (gloo)."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")

    def agree(self) -> int:
        """Update and return `signal`; all ranks must call this after the same step.

        Collectives: one all-reduce of one number between the hosts (gloo), so that no device waits.
        """
        self.signal = self._seen
        if self._group is not None:
            seen = torch.tensor([self._seen])
            dist.all_reduce(seen, dist.ReduceOp.MAX, group=self._group)
            self.signal = int(seen)
        return self.signal
