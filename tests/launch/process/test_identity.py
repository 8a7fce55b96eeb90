"""A process is known by its machine, its id and its start: containers share host names, and ids are used again."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from launch.process import watchdog
from launch.process.identity import ProcessIdentity, alive, machine, start_time, stopped, this_process
from launch.process.watchdog import Watchdog, peers

SAY = "from launch.process.identity import this_process; print(*this_process(), sep='|')"
UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc"]


def can_unshare() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0


def identity_of(command: list[str]) -> ProcessIdentity:
    said = subprocess.run([*command, sys.executable, "-c", SAY], capture_output=True, text=True, check=True).stdout
    where, pid, started = said.strip().split("|")
    return ProcessIdentity(where, int(pid), int(started))


def test_processes_of_one_machine():
    other = identity_of([])
    assert other.machine == this_process().machine == machine()
    assert other.pid != os.getpid() and other.started >= this_process().started


@pytest.mark.skipif(not can_unshare(), reason="no namespaces can be made here")
def test_a_container_of_the_same_host_name_is_another_machine():
    container = identity_of(UNSHARE)
    assert container.machine != machine()
    everybody = [this_process(), this_process()._replace(pid=7), container, container._replace(pid=9)]
    assert peers(everybody, 0) == {1: everybody[1]}
    assert peers(everybody, 3) == {2: container}


def test_alive():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_time(child.pid)
    assert alive(child.pid) and alive(child.pid, started)
    assert not alive(child.pid, started - 1)  # a later process with the id of one that has ended
    child.kill()
    until = time.monotonic() + 10
    while alive(child.pid, started) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive(child.pid)  # a zombie
    child.wait()
    assert not alive(child.pid) and start_time(child.pid) is None


def test_only_a_stopped_process_is_killed_and_no_stranger_with_its_id(monkeypatch):
    monkeypatch.setattr(watchdog, "NOTICED_SECONDS", 0.2)
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    peer = ProcessIdentity(machine(), stranger.pid, start_time(stranger.pid))
    Watchdog._end_stopped([peer])
    assert not stopped(*peer[1:])
    stranger.send_signal(signal.SIGSTOP)
    until = time.monotonic() + 10
    while not stopped(*peer[1:]) and time.monotonic() < until:
        time.sleep(0.01)
    assert stopped(*peer[1:]) and alive(*peer[1:])
    gone = peer._replace(started=peer.started - 1)
    assert not stopped(*gone[1:])
    Watchdog._end_stopped([gone])
    time.sleep(0.5)
    assert stranger.poll() is None
    Watchdog._end_stopped([peer])
    assert stranger.wait(10) == -9
