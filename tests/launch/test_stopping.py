"""A signal is heard whenever it comes, by all ranks after the same step."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from launch.process.signals import SIGNALS, EvaluationCut, StopOnSignal

STATE = SimpleNamespace(global_step=3)


def interrupted_while_agreeing(monkeypatch) -> StopOnSignal:
    """A signal that comes when this rank's word is given already, and the others' are waited for."""
    stop, words = StopOnSignal(), []
    stop._group = "others"

    def all_reduce(seen, op, group):
        words.append(int(seen))
        if len(words) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return stop


def test_a_signal_in_the_middle_of_agreeing_is_heard_after_the_next_step(monkeypatch):
    with interrupted_while_agreeing(monkeypatch) as stop:
        stop.on_step_end(None, STATE, None)
        assert stop.signal == 0  # as the others believe
        stop.on_step_end(None, STATE, None)
        assert stop.signal == signal.SIGTERM


def test_the_same_in_an_evaluation(monkeypatch):
    with interrupted_while_agreeing(monkeypatch) as stop:
        stop.on_prediction_step(None, STATE, None)
        with pytest.raises(EvaluationCut):
            stop.on_prediction_step(None, STATE, None)


def test_alone_and_not_once_it_no_longer_listens():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopOnSignal() as stop:
        stop.on_step_end(None, STATE, None)
        assert stop.signal == 0
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        stop.on_step_end(None, STATE, None)
        assert stop.signal == signal.SIGINT  # the first
    assert [signal.getsignal(number) for number in SIGNALS] == before
