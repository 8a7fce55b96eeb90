"""Work done once a machine: all ranks get the answer, or all get the error, and none waits for a lost one."""

import os
import time

import pytest
import torch.distributed as dist

from launch.common.errors import UserError
from launch.process import identity, once
from launch.process.once import once_a_machine
from tests.support.ranks import Ranks


def calls(many: bool, failing: int = -1, error: type[Exception] = UserError, dies: int = -1):
    """Called on every rank. Returns who worked, and the answer."""
    rank = dist.get_rank()
    os.environ["RANK"] = str(rank)
    identity.machine = (lambda: f"machine {rank // 2}") if many else (lambda: "one")
    worked = []

    def work() -> str:
        worked.append(rank)
        time.sleep(0.3)
        if rank == failing:
            raise error("no such file")
        if rank == dies:
            os._exit(1)
        return f"of rank {rank}"

    return worked, once_a_machine(work, "working")


@pytest.fixture
def four():
    with Ranks(4) as ranks:
        yield ranks


def test_one_rank_of_each_machine_works(four):
    assert four.run(calls, False) == [([0], "of rank 0"), *[([], "of rank 0")] * 3]
    answers = four.run(calls, True)
    assert answers == [([0], "of rank 0"), ([], "of rank 0"), ([2], "of rank 2"), ([], "of rank 2")]


@pytest.mark.parametrize("many", [False, True])
def test_an_error_is_raised_on_all_ranks(four, many):
    failing = 2 if many else 0
    words = f"rank {failing}: no such file" if failing else "no such file"
    for outcome in four.attempt(calls, many, failing):
        assert (outcome.error, outcome.message) == ("UserError", words)
    outcomes = four.attempt(calls, many, failing, ZeroDivisionError)
    assert [outcome.error for outcome in outcomes] == [
        "ZeroDivisionError" if rank == failing else "UserError" for rank in range(4)
    ]
    assert f"rank {failing} failed working: ZeroDivisionError('no such file')" in outcomes[3].message


def test_nobody_waits_for_a_rank_that_is_gone(four):
    outcomes = four.attempt(calls, False, -1, UserError, 0)
    assert [outcome.error for outcome in outcomes] == ["died", *["UserError"] * 3]
    assert "rank 0 is gone while working" in outcomes[1].message


def silent():
    """The first rank of another machine stops answering for longer than the others wait."""
    once.LOST_SECONDS, once.BEAT_SECONDS = 1.0, 100.0
    rank = dist.get_rank()
    os.environ["RANK"] = str(rank)
    identity.machine = lambda: f"machine {rank}"
    return once_a_machine(lambda: time.sleep(4 if rank == 1 else 0) or "done", "working")


def test_a_machine_that_is_silent_is_taken_for_lost():
    with Ranks(2) as ranks:
        first, second = ranks.attempt(silent)
    assert first.error == "UserError" and "rank 1 is gone while working" in first.message
    assert second.value == "done"
