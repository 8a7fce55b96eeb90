"""Where the ranks of a run find each other: a store on a port that no other run of this machine has.

`deepspeed` tells its ranks port 29500 unless --master_port says another one. On one node the first rank takes a free
port instead, before the others look for it, and leaves a note of it for them.
"""

import errno
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from launch.common.errors import UserError
from launch.process.device import device_problem
from launch.process.launcher import one_node_launch
from launch.process.ranks import is_main, start_alone, world_size

LOOK_SECONDS = 0.05
_stores: list[dist.TCPStore] = []  # kept open: the process group shares this process's store of its port


@contextmanager
def rendezvous() -> Iterator[None]:
    """Enter to start the process group in it, by the environment; a process that is alone has one then.

    Raises:
        UserError: On the first rank, if the port is in use; the launcher ends the ranks that wait for it. On a rank
            that has no GPU of its own.
    """
    if problem := device_problem(int(os.environ.get("LOCAL_RANK", "0"))):
        raise UserError(problem)
    start_alone()
    note = None
    if world_size() > 1 and not dist.is_initialized():
        note = _meet()
    try:
        yield
    finally:
        if note is not None and is_main():
            note.unlink(missing_ok=True)


def _meet() -> Path | None:
    """Set `MASTER_PORT` to the port of the first rank's store; return the note that names it, if there is one."""
    launch = one_node_launch()
    if launch is None:
        if is_main() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # torchrun has the store itself
            _listening("", int(os.environ["MASTER_PORT"])).close()
        return None
    note = Path(tempfile.gettempdir()) / f"sft-port-{os.getuid()}-{launch.pid}-{launch.started}"
    if is_main():
        server = _listening("127.0.0.1", int(os.environ["MASTER_PORT"]) if launch.port_chosen else 0)
        port = server.getsockname()[1]
        _stores.append(
            dist.TCPStore(
                "127.0.0.1",
                port,
                is_master=True,
                wait_for_workers=False,
                multi_tenant=True,
                master_listen_fd=server.detach(),
            )
        )
        _write(note, str(port))
    os.environ["MASTER_PORT"] = str(int(_read(note)))
    return note


def _listening(address: str, port: int) -> socket.socket:
    try:
        return socket.create_server((address, port))
    except OSError as error:
        reason = "is in use, perhaps by another run" if error.errno == errno.EADDRINUSE else f"({error.strerror})"
        raise UserError(
            f"port {port} of this machine {reason}: the ranks cannot meet there; name another, as in `deepspeed "
            f"--master_port {port + 1} launch/sft.py ...`, or as MASTER_PORT for srun and mpirun"
        ) from None


def _write(note: Path, text: str) -> None:
    """Write a file that nobody else of this machine may have made or may read."""
    partial = note.with_name(f"{note.name}.partial")
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(file, "w") as stream:
        stream.write(text)
    partial.rename(note)


def _read(note: Path) -> str:
    while not note.exists():
        time.sleep(LOOK_SECONDS)
    with note.open() as stream:
        if os.fstat(stream.fileno()).st_uid != os.getuid():
            raise UserError(f"{note} is another user's file, where this run's first rank was to say its port")
        return stream.read()
