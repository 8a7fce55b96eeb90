"""What a rank makes of others that are silent, busy with storage, or cut off with the store of all ranks.

The ranks are processes of a group that train nothing: each does one thing under its watchdog.
"""

import selectors
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.forked import ForkedRuns

SECONDS = 60
BEGIN = """
import os
import signal
import time
from pathlib import Path

import torch.distributed as dist

from launch.process import identity, roll_call, watchdog

rank = int(os.environ["RANK"])
begin = Path("begin")
watchdog.STORAGE_PATIENCE = 10**6


def on_machine(name):
    identity.machine = lambda: name


def enter(limit):
    dist.init_process_group("gloo")
    dog = watchdog.Watchdog(limit).__enter__()
    print(f"rank {rank} is process {os.getpid()}", flush=True)
    while not begin.exists():
        dog.beat("step 5")
        time.sleep(0.01)
    return dog
"""


class Group(ForkedRuns):
    """Ranks that run `code` after `BEGIN`; `begin()` lets them go past `enter`."""

    def __init__(self, folder: Path, ranks: int, code: str):
        self.folder, self.log, self.size = folder, folder / "log", ranks
        self.log.touch()
        super().__init__(ranks, [], self.log, cwd=folder, before=BEGIN + code)

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_) -> None:
        self.end()

    def said(self) -> str:
        return self.log.read_text()

    def until(self, words: str, times: int = 1) -> None:
        end = time.monotonic() + SECONDS
        while self.said().count(words) < times:
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    def rank(self, number: int) -> psutil.Process:
        """A rank's process, once all have entered."""
        self.until("is process", self.size)
        return psutil.Process(int(self.said().split(f"rank {number} is process ")[1].split()[0]))

    def begin(self) -> None:
        self.until("is process", self.size)
        (self.folder / "begin").touch()

    def code(self) -> int | None:
        """The launcher's exit code, when all have ended."""
        return self.wait(SECONDS)


class Link:
    """A port of this machine that leads to another one, until it is cut: then nothing comes through any more."""

    def __init__(self):
        self._cut = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]

    def lead_to(self, port: int) -> None:
        threading.Thread(target=self._forward, args=(port,), daemon=True).start()

    def cut(self) -> None:
        self._cut.set()

    def _forward(self, port: int) -> None:
        ends = selectors.DefaultSelector()
        ends.register(self._listening, selectors.EVENT_READ, None)
        while not self._cut.is_set():
            for key, _ in ends.select(0.05):
                if key.data is None:
                    near, far = self._listening.accept()[0], _connect(port)
                    ends.register(near, selectors.EVENT_READ, far)
                    ends.register(far, selectors.EVENT_READ, near)
                elif data := key.fileobj.recv(1 << 16):
                    with suppress(OSError):
                        key.data.sendall(data)
                else:
                    ends.unregister(key.fileobj)


def _connect(port: int) -> socket.socket:
    """A connection to a port of this machine, as soon as somebody listens there."""
    while True:
        with suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port))
        time.sleep(0.01)


TWO_NODES = """
if rank == 0:
    Path("port.partial").write_text(os.environ["MASTER_PORT"])
    Path("port.partial").rename("port")
    on_machine("another")
    enter(0)
    time.sleep(600)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a rank that notes it for the end of its step
roll_call.ANSWER_SECONDS = 1
os.environ["MASTER_PORT"] = "{port}"
enter(2).beat("saving", storage={storage})
dist.barrier()
"""


@pytest.mark.parametrize("storage", [False, True])
def test_a_node_that_is_cut_off_from_the_store(tmp_path, storage):
    """Its ranks run, and none of them accuses or kills another; each says which link is lost. So while it saves."""
    link = Link()
    with Group(tmp_path, 3, TWO_NODES.format(port=link.port, storage=storage)) as group:
        while not (tmp_path / "port").exists():
            time.sleep(0.01)
        link.lead_to(int((tmp_path / "port").read_text()))
        neighbours = [group.rank(1), group.rank(2)]
        link.cut()
        group.begin()
        assert group.code() == 1, group.said()
        assert not any(neighbour.is_running() for neighbour in neighbours)
    for rank in (1, 2):
        assert f"rank {rank} on {socket.gethostname()}: no progress for " in group.said()
    lost = f"the store of the ranks at 127.0.0.1:{link.port} does not answer: the link from this machine to rank 0's"
    assert group.said().count(lost) == 2 and "waits in barrier" in group.said()
    assert "hangs" not in group.said() and "stopped" not in group.said()


STOPPED_STORE = """
roll_call.ANSWER_SECONDS = 1
dog = enter(2)
dist.barrier()
"""


def test_the_rank_that_keeps_the_store_is_stopped(tmp_path):
    """It is named and killed, after the other's exit code is known to the launcher."""
    with Group(tmp_path, 2, STOPPED_STORE) as group:
        group.rank(0).send_signal(signal.SIGSTOP)
        group.begin()
        assert group.code() == 1, group.said()
    assert "does not answer: rank 0, whose process keeps the store, is stopped" in group.said()
    assert "rank 0 does not answer: stopped (process " in group.said()


SILENT_WHILE_SAVING = """
on_machine(f"that of rank {rank}")
roll_call.ANSWER_SECONDS = 2
enter(2).beat("saving", storage=True)
dist.barrier()
"""


def test_a_silent_rank_is_lost_also_while_the_others_save(tmp_path):
    """As on another node, whose processes are not seen."""
    with Group(tmp_path, 2, SILENT_WHILE_SAVING) as group:
        group.rank(1).send_signal(signal.SIGSTOP)
        group.begin()
        group.until("rank 1 does not answer: stopped, or its node or the link to it is lost")
    assert "no progress for " in group.said() and "during saving" in group.said()


LONG_SAVE = """
dog = enter(1)
dog.beat("saving", storage={storage}) if rank == 0 else dog.beat("step 6")
if rank == 0:
    time.sleep(6)
dist.barrier()
dog.__exit__()
"""


@pytest.mark.parametrize(("storage", "code"), [(True, 0), (False, 1)])
def test_who_answers_that_it_is_at_its_storage_is_waited_for(tmp_path, storage, code):
    with Group(tmp_path, 2, LONG_SAVE.format(storage=storage)) as group:
        group.begin()
        assert group.code() == code, group.said()
    assert ("is in no collective, but in " in group.said()) == bool(code)
