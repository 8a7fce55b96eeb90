"""Which port the ranks meet at, and what is said of one that is taken."""

import os
import socket
import sys
from pathlib import Path

import pytest

from launch.common.errors import UserError
from launch.process import rendezvous
from launch.process.launcher import Launch, _chooses_port
from tests.support.processes import free_port

STARTS_RANKS = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30=", "--master_port=29500"]
DEEPSPEED = [sys.executable, "/usr/bin/deepspeed"]


@pytest.mark.parametrize(
    ("above", "chosen"),
    [
        ([*DEEPSPEED, "launch/sft.py", "--tp", "2"], False),
        ([*DEEPSPEED, "--num_gpus", "2", "launch/sft.py", "--master_port", "1"], False),
        ([*DEEPSPEED, "--master_port=29500", "launch/sft.py"], True),
        ([*DEEPSPEED, "--master_port", "4711", "launch/sft.py"], True),
        ([sys.executable, "-m", "deepspeed.launcher.runner", "--master_p", "4711", "launch/sft.py"], True),
        (["bash"], True),  # who starts the ranks' launcher by hand names the port by hand
    ],
)
def test_who_chose_the_port(above, chosen):
    assert _chooses_port(STARTS_RANKS, above) == chosen


def test_a_port_that_is_taken(monkeypatch):
    """As with torchrun's or mpirun's environment, or on several nodes."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with socket.create_server(("", free_port())) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with (
            pytest.raises(UserError, match=f"port {port} .* in use.* --master_port {port + 1} "),
            rendezvous.rendezvous(),
        ):
            pass
        monkeypatch.setattr(rendezvous, "one_node_launch", lambda: Launch(7, 8, True))
        with pytest.raises(UserError, match=f"port {port} .* in use"), rendezvous.rendezvous():
            pass
        monkeypatch.setattr(rendezvous, "one_node_launch", lambda: None)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # torchrun has a store there
        with rendezvous.rendezvous():
            assert os.environ["MASTER_PORT"] == str(port)


def test_the_first_rank_takes_a_free_port_and_removes_its_note(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(rendezvous, "one_node_launch", lambda: Launch(7, 8, False))
    monkeypatch.setattr(rendezvous.tempfile, "gettempdir", lambda: str(tmp_path))
    with rendezvous.rendezvous():
        (note,) = tmp_path.iterdir()
        assert note.name == f"sft-port-{os.getuid()}-7-8" and note.stat().st_mode & 0o77 == 0
        assert note.read_text() == os.environ["MASTER_PORT"] != "29500"
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("MASTER_PORT", "29500")
        with rendezvous.rendezvous():
            assert note.read_text() == os.environ["MASTER_PORT"]
        monkeypatch.setenv("RANK", "0")
        assert note.exists()
    assert not note.exists()
    rendezvous._stores.clear()


def test_a_note_of_another_user_is_not_believed(monkeypatch, tmp_path):
    note = tmp_path / "note"
    note.write_text("4711")
    monkeypatch.setattr(os, "getuid", lambda: Path(note).stat().st_uid + 1)
    with pytest.raises(UserError, match="another user's file"):
        rendezvous._read(note)
