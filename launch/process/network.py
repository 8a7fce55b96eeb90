"""What the ranks of a run talk over: gloo's interface, and how long a collective waits for a rank."""

import ipaddress
import os
import socket
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil

from launch.common.library_patches import set_collective_timeout

INTERFACES = Path("/sys/class/net")
PATIENCE, FOR_EVER = timedelta(hours=2), timedelta(weeks=52)
DISCARD = 9  # a port; nothing is sent to it
ELSEWHERE = "192.0.2.1"  # nobody's (RFC 5737), so that the way there is the way out


def choose_interface(one_machine: bool) -> None:
    """Where all ranks are on this machine gloo listens on its loopback alone, else where the other nodes are.

    By itself gloo takes the address that the host's name stands for, which on many machines is one of the loopback's
    that no other node can reach. `GLOO_SOCKET_IFNAME` overrules this, and NCCL's own choice is heeded.
    """
    names = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if one_machine:
        chosen = "lo" if (INTERFACES / "lo").exists() else None
    elif names and all((INTERFACES / name).exists() for name in names.split(",")):
        chosen = names
    else:
        chosen = interface_towards(os.environ.get("MASTER_ADDR", ""))
    if chosen is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", chosen)


def interface_towards(host: str) -> str | None:
    """The interface that this machine reaches `host` by; None if that cannot be told.

    Many machines have their own name for an address of their loopback. Others do not reach it there, but by the way
    out.
    """
    if not host:
        return None
    with suppress(OSError):
        family, *_, address = socket.getaddrinfo(host, DISCARD, type=socket.SOCK_DGRAM)[0]
        if address[0] != host and ipaddress.ip_address(address[0]).is_loopback:
            family, address = socket.AF_INET, (ELSEWHERE, DISCARD)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if any(entry.address.partition("%")[0] == own for entry in addresses):
                return name
    return None


def wait_longer_than(limit: float) -> None:
    """Let collectives wait longer than so many seconds, after which the watchdog is to speak first; 0 is for ever.

    Those of the groups that there will be, and of the one that there is: DeepSpeed makes groups without saying how
    long they wait, and NCCL's default of ten minutes would end the process with none of the watchdog's words.
    """
    wanted = 2 * limit or FOR_EVER.total_seconds()
    patience = max(PATIENCE, timedelta(seconds=min(wanted, FOR_EVER.total_seconds())))
    set_collective_timeout(patience)
