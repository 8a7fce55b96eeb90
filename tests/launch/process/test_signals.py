"""A signal is heard whenever it comes, by all ranks after the same step."""

import os
import signal

import pytest
import torch.distributed as dist

from launch.process.signals import SIGNALS, EvaluationCut, StopOnSignal
from launch.training.milestones import Milestones


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
        assert stop.agree() == stop.signal == 0  # as the others believe
        assert stop.agree() == stop.signal == signal.SIGTERM


def test_the_same_in_an_evaluation(monkeypatch):
    with interrupted_while_agreeing(monkeypatch) as stop:
        milestones = Milestones(stop)
        milestones.on_prediction_step(None, None, None)
        with pytest.raises(EvaluationCut):
            milestones.on_prediction_step(None, None, None)


def test_alone_and_not_once_it_no_longer_listens():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopOnSignal() as stop:
        assert stop.agree() == 0
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agree() == signal.SIGINT  # the first
    assert [signal.getsignal(number) for number in SIGNALS] == before
