"""SIGTERM or Ctrl-C: noted, and agreed on by all ranks after the step under way (`milestones` does the rest)."""

import os
import signal

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from launch.process.ranks import say

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run ended on a signal, with a checkpoint. `code`: what the process exits with."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.code = 128 + number


class EvaluationCut(Exception):
    """A signal has come during an evaluation, which may be longer than what is left until the launcher kills."""


class StopOnSignal(TrainerCallback):
    """`signal`: the first that any rank has seen, the same on all of them after each step; 0 for none.

    Listens while entered; ends an evaluation with `EvaluationCut`, on all ranks after the same batch. A second Ctrl-C
    ends the process at once. The deepspeed launcher passes a signal on to one rank after another and gives each half
    a minute, so a step and its checkpoint have that long. Collectives: one all-reduce of one number a step, or batch
    of an evaluation, between the hosts (gloo), so that no device waits.
    """

    def __init__(self):
        self.signal = 0
        self._seen = 0  # on this rank, at any moment, also in the middle of agreeing on it
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

    def on_train_begin(self, args, state, control, **kwargs):
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")

    def on_step_end(self, args, state, control, **kwargs):
        self.signal = self._agreed()
        if self.signal:
            say(f"stopping on {signal.Signals(self.signal).name} after step {state.global_step}: saving a checkpoint")

    def on_prediction_step(self, args, state, control, **kwargs):
        self.signal = self._agreed()
        if self.signal:
            raise EvaluationCut

    def _agreed(self) -> int:
        if self._group is None:
            return self._seen
        seen = torch.tensor([self._seen])
        dist.all_reduce(seen, dist.ReduceOp.MAX, group=self._group)
        return int(seen)
