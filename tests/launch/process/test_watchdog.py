"""What is said of a rank that waits: the collective, and who called it."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from launch.process.watchdog import describe_thread
from smoothing.core.collectives import all_gather, start_all_gather, start_all_reduce

SHARD = SimpleNamespace(world_size=2, group=None)
CALLS = {
    "all_reduce_wait": lambda: start_all_reduce(torch.zeros(1), SHARD)(),
    "all_gather_wait": lambda: start_all_gather(torch.zeros(1), SHARD)(),
    "all_gather": lambda: all_gather(torch.zeros(1), SHARD),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_collective_that_was_begun_before(monkeypatch, name):
    said = []

    class Work:
        def wait(self):
            said.append(describe_thread(sys._getframe()))

    for begin in ("smoothing.core.collectives._all_gather", "torch.distributed.all_reduce"):
        monkeypatch.setattr(begin, lambda *_, **__: Work())
    CALLS[name]()
    (text,) = said
    assert text.startswith(f"waits in {name}, called at ") and "launch/process/test_watchdog.py:" in text


def test_no_collective():
    assert "is in no collective, but in test_no_collective at " in describe_thread(sys._getframe())
    assert describe_thread(None) == "has no main thread" and not dist.is_initialized()
