"""The network between the ranks: gloo's interface, and how long a collective waits for a rank."""

import ipaddress
import os
import socket
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil

from launch.common.library_patches import set_collective_timeout

INTERFACES = Path("/sys/class/net")
TIMEOUT, FOREVER = timedelta(hours=2), timedelta(weeks=52)
DISCARD = 9  # a port; nothing is sent to it
ELSEWHERE = "192.0.2.1"  # reserved for documents (RFC 5737), so that the route there is the default route


def choose_interface(one_machine: bool) -> None:
    """Make gloo listen on the loopback alone if all ranks are on this machine, else on the interface to other nodes.

    By default gloo takes the address of the host's name, which on many machines is a loopback address that no other
    node can reach. `GLOO_SOCKET_IFNAME` overrules this, and `NCCL_SOCKET_IFNAME` is used if set.
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
    """Return the interface that this machine reaches `host` by, or None if that is unknown.

    Where `host` resolves to a loopback address, as many machines' own names do, it is the default route's.
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
    """Let collectives wait longer than so many seconds, so that the watchdog reports first; 0 is forever.

    NCCL's default of ten minutes would end the process without the watchdog's report.
    """
    wanted = 2 * limit or FOREVER.total_seconds()
    timeout = max(TIMEOUT, timedelta(seconds=min(wanted, FOREVER.total_seconds())))
    set_collective_timeout(timeout)
