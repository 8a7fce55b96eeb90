"""What launchers' variables make of a process, and which of them contradict each other."""

import os

import pytest
import torch

from launch.common.errors import UserError
from launch.process import device
from launch.process.place import DEFAULT_PORT, LAUNCHERS, PORTS, first_host, is_rank, take_place

TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_SLURM = ("NODEID", "STEP_NODELIST", "JOB_NODELIST", "JOB_ID", "STEP_ID")
OTHERS = ("PMIX_NAMESPACE", *(f"SLURM_{name}" for name in OF_SLURM))
STARTERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")


def slurm(rank: int, world: int, local: int, tasks: str, node: int = 0, **more) -> dict:
    place = {"PROCID": rank, "STEP_NUM_TASKS": world, "LOCALID": local, "STEP_TASKS_PER_NODE": tasks, "NODEID": node}
    job = {"STEP_NODELIST": "node[07-08,11],other", "JOB_ID": 4711, "STEP_ID": 0}
    return {f"SLURM_{name}": str(value) for name, value in (place | job | more).items()}


def openmpi(rank: int, world: int, local: int, here: int) -> dict:
    values = {"RANK": rank, "SIZE": world, "LOCAL_RANK": local, "LOCAL_SIZE": here}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in values.items()}


def mpich(rank: int, world: int, local: int, here: int) -> dict:
    values = {"PMI_RANK": rank, "PMI_SIZE": world, "MPI_LOCALRANKID": local, "MPI_LOCALNRANKS": here}
    return {name: str(value) for name, value in values.items()}


def torch_names(rank: int, world: int, local: int, **more) -> dict:
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local, "MASTER_ADDR": "node1", "MASTER_PORT": 29500}
    return {name: str(value) for name, value in (place | more).items()}


@pytest.fixture
def set_only(monkeypatch):
    """Make these the only variables of a launcher."""

    def set_them(values: dict) -> None:
        for name in {*TORCH, *OTHERS, *STARTERS, *(name for names in LAUNCHERS.values() for name in names)}:
            monkeypatch.setenv(name, "")  # so that what is set by the code is taken back
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_them


PLACES = [
    (slurm(5, 8, 1, "4(x2)", node=1), ("5", "8", "1", "4", "node07")),
    (slurm(8, 11, 0, "4(x2),3", node=2), ("8", "11", "0", "3", "node07")),
    (slurm(3, 4, 3, "4"), ("3", "4", "3", "4", "127.0.0.1")),
    (slurm(1, 2, 0, "1(x2)", node=1, STEP_NODELIST="a1,a2"), ("1", "2", "0", "1", "a1")),
    (openmpi(1, 2, 1, 2), ("1", "2", "1", "2", "127.0.0.1")),
    (openmpi(2, 4, 0, 2) | {"MASTER_ADDR": "first"}, ("2", "4", "0", "2", "first")),
    (mpich(1, 2, 1, 2), ("1", "2", "1", "2", "127.0.0.1")),
    (slurm(1, 2, 0, "1(x2)", node=1) | openmpi(6, 8, 2, 4) | {"MASTER_ADDR": "first"}, ("6", "8", "2", "4", "first")),
    (slurm(1, 4, 1, "4") | {"PMI_RANK": "1", "PMI_SIZE": "4"}, ("1", "4", "1", "4", "127.0.0.1")),  # --mpi=pmi2
    (slurm(0, 1, 0, "1"), ("0", "1", "0", "1", None)),
    (slurm(1, 4, 1, "4") | {"WORLD_SIZE": "4", "MASTER_PORT": "77"}, ("1", "4", "1", "4", "127.0.0.1")),
    (torch_names(3, 4, 1), ("3", "4", "1", None, "node1")),
    (torch_names(3, 4, 1) | slurm(1, 2, 0, "1(x2)", node=1), ("3", "4", "1", None, "node1")),
    # torchrun numbers nodes as they come
    (torch_names(0, 2, 0, TORCHELASTIC_RUN_ID=7) | slurm(1, 2, 0, "1(x2)", node=1), ("0", "2", "0", None, "node1")),
    ({}, (None, None, None, None, None)),
]


@pytest.mark.parametrize(("given", "place"), PLACES)
def test_places(set_only, given, place):
    set_only(given)
    take_place()
    assert tuple(os.environ.get(name) for name in TORCH[:5]) == place
    if place[1] not in (None, "1"):
        assert "MASTER_PORT" in given or int(os.environ["MASTER_PORT"]) in [*PORTS, DEFAULT_PORT]
    assert is_rank(given) == ("RANK" in given or place[1] not in (None, "1"))
    take_place()  # it knows its own names
    assert tuple(os.environ.get(name) for name in TORCH[:5]) == place


def test_ranks_of_one_start_find_one_port_and_other_starts_another(set_only):
    ports = []
    for given in (
        slurm(0, 2, 0, "1(x2)"),
        slurm(1, 2, 0, "1(x2)", node=1),
        slurm(0, 2, 0, "1(x2)", STEP_ID=1),
        slurm(0, 2, 0, "1(x2)", JOB_ID=4712),
    ):
        set_only(given)
        take_place()
        ports.append(os.environ["MASTER_PORT"])
    assert ports[0] == ports[1] and len(set(ports)) == 3


CONTRADICTIONS = [
    ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but nothing tells which"),
    ({"PMI_SIZE": "8"}, "PMI_SIZE is 8, but nothing tells which"),
    ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS is 8, but nothing tells which"),
    ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK is set, and LOCAL_RANK not"),
    ({"RANK": "1"}, "RANK is set, and WORLD_SIZE and LOCAL_RANK not"),
    (torch_names(4, 4, 0), "RANK is 4, but WORLD_SIZE is 4"),
    (torch_names(3, 4, 4), "LOCAL_RANK is 4, but the launcher tells of 4 processes on this machine"),
    (torch_names(3, 4, 2, LOCAL_WORLD_SIZE=2), "LOCAL_RANK is 2, but the launcher tells of 2 processes"),
    (torch_names(3, "four", 2), "WORLD_SIZE is 'four', where a whole number was expected"),
    (torch_names(3, 4, -1), "LOCAL_RANK is '-1', where a whole number"),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}, "RANK is set, and MASTER_PORT not"),
    (torch_names(0, 4, 0) | slurm(3, 4, 3, "4"), "RANK is 0, but srun says that this is process 3 of 4 "),
    (slurm(1, 4, 1, "4") | {"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but srun has started 4 processes"),
    (openmpi(2, 4, 0, 2), "Open MPI has started processes on several machines, .*mpirun -x MASTER_ADDR=node1"),
    (slurm(0, 2, 0, "1(x2)", node=1), "does not tell where the first one is; set MASTER_ADDR"),
    (openmpi(1, 2, 2, 2), "OMPI_COMM_WORLD_LOCAL_RANK is 2, but mpirun of Open MPI tells of 2 processes"),
]


@pytest.mark.parametrize(("given", "words"), CONTRADICTIONS)
def test_contradictions(set_only, given, words):
    set_only(given)
    with pytest.raises(UserError, match=words):
        take_place()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[01-04,07]", "node01"),
        ("node[7,9-12],a1", "node7"),
        ("rack[2-3]-gpu[08-09].site,x", "rack2-gpu08.site"),
        ("tux[5]", "tux5"),
    ],
)
def test_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_a_rank_without_a_gpu_of_its_own(monkeypatch):
    """As under `srun --gpus-per-task 1`, where each task sees its own as number 0."""
    monkeypatch.setattr(device, "uses_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device.device_problem(0) is None
    assert "LOCAL_RANK is 3, and this process sees 1 GPU:" in device.device_problem(3)
