"""Two nodes of two ranks, tensor parallelism inside and data parallelism across, and the link between them cut.

The nodes are namespaces of this machine (`tests.support.hosts`). The run is started by torchrun, and resumed by the
variables of srun.
"""

import os
import sys
from pathlib import Path

import pytest

from tests.support import hosts
from tests.support.launches import SCRIPT, Launch, weights
from tests.support.processes import free_port
from tests.support.small_run import flags, launch_many, metrics, write_data, write_model

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(hosts.problem() is not None, reason=str(hosts.problem())),
]
SECONDS = 300  # for what ends by itself, much earlier
VALUES = {
    "smoothing": 0.1,
    "optim": "sgd",  # Adam would forgive a gradient that is wrong by a factor
    "learning_rate": 0.3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_steps": 2,
    "max_length": 96,
    "samples": 0,
}


Starts = list[tuple[int, list[str]]]  # the node and the words of each process that a user or a launcher starts


def by_torchrun() -> Starts:
    """One a node, which starts its ranks."""
    port = free_port()
    program = str(Path(sys.executable).with_name("torchrun"))
    place = f"--nnodes 2 --nproc_per_node 2 --master_addr node1 --master_port {port} --node_rank".split()
    return [(node, [program, *place, str(node)]) for node in range(2)]


def by_srun() -> Starts:
    """What srun sets for four tasks on two nodes."""
    places = []
    for rank in range(4):
        place = {"PROCID": rank, "LOCALID": rank % 2, "NODEID": rank // 2, "STEP_NUM_TASKS": 4}
        place |= {"STEP_TASKS_PER_NODE": "2(x2)", "STEP_NODELIST": "node[1-2]", "JOB_ID": os.getpid(), "STEP_ID": 0}
        words = [f"SLURM_{name}={value}" for name, value in place.items()]
        places.append((rank // 2, ["env", *words, sys.executable]))
    return places


def start(nodes: hosts.TwoHosts, folder: Path, starts: Starts, steps: int) -> list[Launch]:
    values = VALUES | {"tp": 2, "zero": 1, "stall_timeout": 10, "max_steps": steps, "per_device_train_batch_size": 4}
    return [Launch(folder, "nodes", values, [*nodes.hosts[node].words(), *words, SCRIPT]) for node, words in starts]


def codes(launches: list[Launch]) -> list[int]:
    """The exit codes, once no process is left."""
    for launch in launches:
        assert launch.gone(SECONDS) is not None, launch.said()[-6000:]
    return [launch.launcher.returncode for launch in launches]


def references(folder: Path, steps: int) -> tuple[Path, Path]:
    """The same run on one machine: untouched by the same ranks, and by one process."""
    given = {"model": folder / "model-tied", "data": folder / "train.jsonl", "max_steps": steps}
    for name, ranks, more in (
        ("untouched", 4, {"tp": 2, "zero": 1, "per_device_train_batch_size": 4}),
        ("alone", 1, {"per_device_train_batch_size": 8}),
    ):
        launch_many(folder, ranks, [flags(VALUES | given | more | {"output_dir": folder / name})])
    return folder / "untouched", folder / "alone"


def test_two_nodes_and_a_link_that_is_cut(tmp_path):
    """Every process of both ends; the resumed run has one process's losses, and an untouched run's weights."""
    write_data(tmp_path)
    write_model(tmp_path, tied=True)
    started: list[Launch] = []
    with hosts.TwoHosts() as nodes:
        try:
            started += (launches := start(nodes, tmp_path, by_torchrun(), 10_000))
            assert launches[0].until(lambda: launches[0].steps() >= 3, SECONDS), launches[0].said()[-6000:]
            nodes.cut()
            steps = launches[0].steps() + 4  # none but the one that is under way can end now
            untouched, alone = references(tmp_path, steps)
            assert codes(launches) == [1, 1]
            said = launches[0].said()
            assert "rank 2 does not answer: stopped, or its node or the link to it is lost" in said
            assert (
                "rank 3 on node2: no progress for " in said
                and "the link from this machine to rank 0's is lost" in said
            )
            nodes.join()
            started += (launches := start(nodes, tmp_path, by_srun(), steps))
            assert set(codes(launches)) == {0}, launches[0].said()[-6000:]
        finally:
            for launch in started:
                launch.end()
    assert f"resuming from {launches[0].output}/checkpoint-" in launches[0].said()
    assert weights(launches[0].output) == weights(untouched)
    got, expected = metrics(launches[0].output), metrics(alone)
    assert [row["step"] for row in got] == [row["step"] for row in expected] == list(range(1, steps + 1))
    for have, want in zip(got, expected, strict=True):
        assert have["label_tokens"] == want["label_tokens"]
        for key in ("loss", "nll", "grad_norm"):
            assert have[key] == pytest.approx(want[key], rel=1e-5), (key, want["step"])
