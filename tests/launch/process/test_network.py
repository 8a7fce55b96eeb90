"""Where gloo listens, and how long collectives wait."""

import os
import socket
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from launch.process.network import choose_interface, interface_towards, wait_longer_than
from launch.process.watchdog import Watchdog
from tests.support.ranks import Ranks


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """What is set here is taken back."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(c10d, "default_pg_timeout", c10d.default_pg_timeout)
    monkeypatch.setattr(c10d, "default_pg_nccl_timeout", c10d.default_pg_nccl_timeout)


def test_an_interface_is_found_by_where_it_leads():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("") is None and interface_towards("nobody.invalid") is None


def test_a_name_for_the_loopback_is_reached_by_the_way_out(monkeypatch):
    """As on a machine that has its own name for 127.0.1.1; other nodes do not reach it there."""
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 2, 17, "", ("127.0.1.1", 9))])
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address[0]))
    interface_towards("node0")
    interface_towards("127.0.1.1")
    assert asked == ["192.0.2.1", "127.0.1.1"]


@pytest.mark.parametrize(
    ("one_machine", "given", "chosen"),
    [
        (True, {}, "lo"),
        (True, {"GLOO_SOCKET_IFNAME": "eth7"}, "eth7"),
        (False, {"MASTER_ADDR": "127.0.0.1"}, "lo"),
        (False, {"MASTER_ADDR": "nobody.invalid"}, None),
        (False, {"MASTER_ADDR": "nobody.invalid", "NCCL_SOCKET_IFNAME": "lo"}, "lo"),
        (False, {"MASTER_ADDR": "nobody.invalid", "NCCL_SOCKET_IFNAME": "^docker"}, None),
    ],
)
def test_where_gloo_listens(monkeypatch, one_machine, given, chosen):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    choose_interface(one_machine)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen


def wait_for_a_peer_that_is_late(limit: float) -> None:
    """In the group that there is, which gives up after 10 s (see `ranks`), and in one made afterwards."""
    with Watchdog(limit):
        for group in (None, dist.new_group()):
            if dist.get_rank() == 1:
                time.sleep(12)
            dist.all_reduce(torch.ones(1), group=group)


def test_collectives_wait_longer_than_the_watchdog():
    with Ranks(2) as ranks:
        ranks.run(wait_for_a_peer_that_is_late, 600.0, time_limit=120)


@pytest.mark.parametrize(("limit", "least"), [(1.0, 3600), (36_000.0, 36_001), (0.0, 10**7), (float("inf"), 10**7)])
def test_how_long_groups_wait(monkeypatch, limit, least):
    monkeypatch.setattr(c10d, "default_pg_nccl_timeout", timedelta(minutes=10))  # a CPU's torch has none
    wait_longer_than(limit)
    for backend in ("nccl", "gloo"):
        assert c10d._get_default_timeout(backend).total_seconds() >= least
