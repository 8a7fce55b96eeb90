"""Two hosts on one machine, joined by a cable: each has its own network, host name and process ids.

They share files, as nodes share storage. Namespaces of Linux do it; `problem` says why they cannot be made here.
"""

import functools
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

ADDRESSES = {"node1": "10.77.0.1", "node2": "10.77.0.2"}
NAMESPACES = ("--net", "--uts", "--pid", "--mount")
UNSHARE = ("unshare", *NAMESPACES, "--mount-proc", "--fork", "--kill-child")
START_SECONDS = 30
# in a host's namespaces: a host name, names of all hosts, and what keeps the namespaces
BOOT = """
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
ip link set lo up
touch "$3"
exec sleep infinity
"""


class Host:
    """One of them. Its processes end when it does."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        booted = folder / name
        self._unshare = psutil.Popen(
            [*UNSHARE, "sh", "-c", BOOT, "sh", name, str(folder / "hosts"), str(booted)],
            stderr=subprocess.PIPE,
            text=True,
        )
        until = time.monotonic() + START_SECONDS
        while not booted.exists():
            if self._unshare.poll() is not None or time.monotonic() > until:
                self.end()
                raise OSError(self._unshare.stderr.read().strip() or f"{name} does not start")
            time.sleep(0.01)
        self.pid = self._unshare.children()[0].pid

    def words(self) -> list[str]:
        """What is put before a command to run it there."""
        return ["nsenter", f"--target={self.pid}", *NAMESPACES, f"--wd={Path.cwd()}"]

    def run(self, *command: str) -> None:
        subprocess.run([*self.words(), *command], check=True, capture_output=True, text=True)

    def end(self) -> None:
        self._unshare.kill()
        self._unshare.wait()


class TwoHosts:
    """node1 and node2 while entered, which know each other by these names."""

    def __enter__(self) -> "TwoHosts":
        self._folder = Path(tempfile.mkdtemp(prefix="hosts-"))
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in ADDRESSES.items())]
        (self._folder / "hosts").write_text("\n".join(lines) + "\n")
        self.hosts: list[Host] = []
        try:
            for name in ADDRESSES:
                self.hosts.append(Host(name, self._folder))
            one, other = self.hosts
            end = ["link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(other.pid)]
            subprocess.run(["nsenter", f"--target={one.pid}", "--net", "ip", *end], check=True, capture_output=True)
            for host in self.hosts:
                host.run("ip", "address", "add", f"{ADDRESSES[host.name]}/24", "dev", "cable")
            self.join()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for host in self.hosts:
            host.end()
        shutil.rmtree(self._folder)

    def cut(self) -> None:
        """From now on nothing comes through, and nobody is told."""
        self.hosts[1].run("ip", "link", "set", "cable", "down")

    def join(self) -> None:
        for host in self.hosts:
            host.run("ip", "link", "set", "cable", "up")


@functools.cache
def problem() -> str | None:
    """Return why hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "network namespaces are made by root alone"
    if missing := [command for command in ("unshare", "nsenter", "ip", "mount") if not shutil.which(command)]:
        return f"there is no {' and no '.join(missing)} to make network namespaces with"
    try:
        with TwoHosts():
            return None
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr}"
    except OSError as error:
        return f"network namespaces cannot be made here: {error}"
