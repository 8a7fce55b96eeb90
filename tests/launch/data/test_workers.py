"""Results in order whatever the number of processes; what ends one costs the item that ended it, and nothing else."""

import faulthandler
import os
import random
import time

import pytest

from launch.data import workers
from launch.data.records import DataError
from launch.data.workers import WorkerError, Workers

BATCHES = [list(range(start, start + 5)) for start in range(0, 60, 5)]


def squares(batch):
    time.sleep(random.random() / 100)  # so that batches overtake one another
    return [item**2 for item in batch]


def abort() -> None:
    faulthandler.disable()  # pytest's, which would print the stack
    os.abort()


def at(deadly: dict):
    """A function like `squares` that does something else at some items."""

    def call(batch):
        for item in batch:
            if item in deadly:
                deadly[item]()
        return squares(batch)

    return call


def mapped(count, call, batches=BATCHES):
    with Workers(count, call, lambda item, reason: [f"{item} {reason}"]) as pool:
        return [value for result in pool.map(batches) for value in result]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_results_are_in_order(count):
    assert mapped(count, squares) == [item**2 for batch in BATCHES for item in batch]


@pytest.mark.parametrize("count", [1, 3])
def test_an_item_that_ends_its_process_is_lost_alone(count):
    deadly = {7: abort, 8: lambda: os._exit(3), 59: abort}
    whole = [item**2 for batch in BATCHES for item in batch]
    whole[7], whole[8], whole[59] = "7 ended by SIGABRT", "8 ended with exit code 3", "59 ended by SIGABRT"
    assert mapped(count, at(deadly)) == whole


@pytest.mark.parametrize("count", [0, 2])
def test_errors_come_after_the_results_before_them(count):
    def refuse():
        raise DataError("no template")

    def batches():
        yield from BATCHES
        raise DataError("broken file")

    for call, source, values, message in (
        (at({22: refuse}), BATCHES, 20, "no template"),
        (squares, batches(), 60, "broken file"),
        (at({22: refuse}), batches(), 20, "no template"),
    ):
        found = []
        with Workers(count, call, None) as pool, pytest.raises(DataError, match=message):
            for result in pool.map(source):
                found += result
        assert found == [item**2 for item in range(values)]


def test_an_error_of_the_code_says_where_it_was_raised():
    with pytest.raises(WorkerError, match=r"(?s)test_workers\.py.*ZeroDivisionError"):
        mapped(1, at({3: lambda: 1 / 0}))


def test_results_that_nobody_wanted_do_not_come_later():
    with Workers(2, squares, None) as pool:
        assert next(pool.map(BATCHES)) == squares(BATCHES[0])
        assert [value for result in pool.map(BATCHES[6:]) for value in result] == [n**2 for n in range(30, 60)]


def test_an_item_that_takes_more_memory_than_there_is_for_one(monkeypatch):
    """It gets a MemoryError where the machine would run out of memory."""
    monkeypatch.setattr(workers, "MEMORY", 64 << 20)

    def call(batch):
        try:
            return [len(bytearray(size)) for size in batch]
        except MemoryError:
            return ["too much"]

    assert mapped(1, call, [[1 << 20], [1 << 30], [1 << 21]]) == [1 << 20, "too much", 1 << 21]


def test_no_process_is_left(tmp_path):
    pids = []

    def call(batch):
        return [os.getpid()]

    with Workers(2, call, None) as pool:
        pids += [pid for result in pool.map(BATCHES) for pid in result]
    for pid in set(pids):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_end_with_the_process_that_started_them():
    """However that ends, here by SIGKILL, and whatever they are at."""
    reading, writing = os.pipe()

    def call(batch):
        os.write(writing, f"{os.getpid()}\n".encode())
        time.sleep(60)

    child = os.fork()
    if child == 0:
        next(Workers(1, call, None).map([[1]]))
    worker = int(os.read(reading, 20))
    os.kill(child, 9)
    os.waitpid(child, 0)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{worker}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] in "ZX":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    raise AssertionError("the worker lives on")
