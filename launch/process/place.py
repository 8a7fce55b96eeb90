"""Which rank a process is: what its launcher says, in the names that torch and the libraries above it read.

torchrun, deepspeed and accelerate set those names. srun and mpirun have their own, and of them only srun tells where
the ranks meet.
"""

import os
import re
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from launch.common.errors import UserError


class Names(NamedTuple):
    """A launcher's variables: which rank this is of how many, in the run and on its machine."""

    rank: str
    world: str
    local_rank: str
    local_world: str


TORCH = Names("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# The first that has set all of its own counts: mpirun may start its processes by srun, and srun's --mpi=pmi2 sets
# PMI_RANK and PMI_SIZE. srun tells how many are on each machine in a list: see `_tasks_here`.
LAUNCHERS = {
    "mpirun of Open MPI": Names(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpirun of MPICH": Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": Names("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}
# what starts the ranks itself, perhaps one launcher a node by srun
STARTS_RANKS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
DEFAULT_PORT = 29500
PORTS = range(20000, 30000)  # below those that Linux gives to connections


def is_rank(environment: Mapping[str, str]) -> bool:
    """Return whether a launcher has started a process with this environment as one of several, or as torch's."""
    name = _launcher(environment)
    return "RANK" in environment or (name is not None and environment[LAUNCHERS[name].world] != "1")


def take_place() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, and where the ranks meet, if the launcher has told them by other names.

    Nothing is set for a process that no launcher started. Raises `UserError` if the variables contradict each other,
    or tell only a part.
    """
    name = _launcher(os.environ)
    if "RANK" in os.environ:
        place = _check("the launcher", TORCH)
        if place[TORCH.world] != "1":
            _check_meeting_point()
        if name is not None and not any(variable in os.environ for variable in STARTS_RANKS):
            _check_same(name, LAUNCHERS[name])
        return
    if name is None:
        _refuse_unknown()
        return
    names = LAUNCHERS[name]
    local_world = _tasks_here() if name == "srun" else _number(names.local_world)
    place = _check(name, names, local_world)
    if "WORLD_SIZE" in os.environ and os.environ["WORLD_SIZE"] != place[TORCH.world]:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {name} has started {place[TORCH.world]} processes "
            f"({names.world}); leave WORLD_SIZE unset"
        )
    os.environ.update(place)
    if place[TORCH.world] != "1":
        os.environ["MASTER_ADDR"] = os.environ.get("MASTER_ADDR") or _address(name, local_world)
        os.environ["MASTER_PORT"] = os.environ.get("MASTER_PORT") or str(_port())


def _launcher(environment: Mapping[str, str]) -> str | None:
    """Return the launcher that has set all of its variables."""
    for name, names in LAUNCHERS.items():
        needed = names if name != "srun" else names[:3]
        if all(variable in environment for variable in needed):
            return name
    return None


def _check(launcher: str, names: Names, local_world: int | None = None) -> dict[str, str]:
    """Return these numbers by torch's names. Raises `UserError` if they are no place among ranks."""
    if missing := [variable for variable in names[:3] if variable not in os.environ]:
        raise UserError(
            f"{names.rank} is set, and {' and '.join(missing)} not: which process of how many this is, in the run "
            "and on its machine, is told by all of RANK, WORLD_SIZE and LOCAL_RANK, or by a launcher"
        )
    rank, world, local_rank = (_number(variable) for variable in names[:3])
    if local_world is None and names is TORCH and names.local_world in os.environ:
        local_world = _number(names.local_world)
    if rank >= world:
        raise UserError(f"{names.rank} is {rank}, but {names.world} is {world}: ranks are counted from 0")
    here = world if local_world is None else local_world
    if local_rank >= here or here > world:
        raise UserError(
            f"{names.local_rank} is {local_rank}, but {launcher} tells of {here} processes on this machine and of "
            f"{world} in all"
        )
    place = {TORCH.rank: str(rank), TORCH.world: str(world), TORCH.local_rank: str(local_rank)}
    return place | ({} if local_world is None else {TORCH.local_world: str(local_world)})


def _check_meeting_point() -> None:
    if missing := [variable for variable in ("MASTER_ADDR", "MASTER_PORT") if variable not in os.environ]:
        raise UserError(
            f"RANK is set, and {' and '.join(missing)} not: set MASTER_ADDR to the machine of rank 0 and "
            f"MASTER_PORT to a free port of it, such as {DEFAULT_PORT}, for all ranks alike"
        )
    _number("MASTER_PORT")


def _check_same(name: str, names: Names) -> None:
    """Raise `UserError` if RANK is another than the launcher's, as where a job script exports one for all tasks."""
    same_world = _number(TORCH.world) == _number(names.world)
    if same_world and _number(TORCH.rank) != _number(names.rank):
        raise UserError(
            f"RANK is {os.environ['RANK']}, but {name} says that this is process {os.environ[names.rank]} of "
            f"{os.environ[names.world]} ({names.rank}); leave RANK, WORLD_SIZE and LOCAL_RANK unset, they are taken "
            "from there"
        )


def _refuse_unknown() -> None:
    """Raise `UserError` if this is one of several processes and nothing tells which."""
    for variable in ("WORLD_SIZE", *(names.world for names in LAUNCHERS.values())):
        if os.environ.get(variable, "1") not in ("", "0", "1"):
            raise UserError(
                f"{variable} is {os.environ[variable]}, but nothing tells which of these processes this is: each "
                "would be a run of its own. Start them with deepspeed, torchrun, srun or mpirun"
            )


def _number(variable: str) -> int:
    text = os.environ[variable]
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"{variable} is {text!r}, where a whole number was expected")
    return int(text)


def _tasks_here() -> int | None:
    """Return how many tasks of srun's are on this machine, of a list such as `4(x2),3`; None if it does not tell."""
    counts: list[int] = []
    for part in os.environ.get(LAUNCHERS["srun"].local_world, "").split(","):
        if match := re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part):
            counts += [int(match[1])] * int(match[2] or 1)
    node = os.environ.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else None


def _address(name: str, local_world: int | None) -> str:
    """Return the machine of rank 0. Raises `UserError` if that is not told."""
    if local_world == _number(LAUNCHERS[name].world):
        return "127.0.0.1"
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    first_is_here = _number(LAUNCHERS[name].rank) == 0 and os.environ.get("SLURM_NODEID", "0") != "0"
    if name != "srun" or not nodes or first_is_here:
        raise UserError(
            f"{name} has started processes on several machines, and does not tell where the first one is; set "
            "MASTER_ADDR to that machine, as in `mpirun -x MASTER_ADDR=node1 ...`"
        )
    return first_host(nodes)


def first_host(nodes: str) -> str:
    """Return the first host of a list such as `node[01-04,07],other3`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _port() -> int:
    """Return a port that all processes of this start know, and that others rarely have."""
    job = [os.environ.get(variable, "") for variable in ("PMIX_NAMESPACE", "SLURM_JOB_ID", "SLURM_STEP_ID")]
    if not any(job):
        return DEFAULT_PORT
    return PORTS[zlib.crc32(" ".join(job).encode()) % len(PORTS)]
