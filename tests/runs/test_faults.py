"""Real launches with real faults: a killed rank, signals, a rank that raises or stands still. Nothing is left over.

`make torture` does the same fifty times at random moments.
"""

import random
import signal
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launch.run.checkpoints import checkpoints, step_of
from tests.runs.torture import LAYOUTS, SCRIPT, Launch, prepare, tortured, weights
from tests.support.processes import launcher
from tests.support.small_run import metrics

START_SECONDS = 120
LAYOUT = LAYOUTS["tp2-zero1"]

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def untouched(folder) -> bytes:
    tortured(folder, "untouched", LAYOUT, random.Random(0), 0, 0, print)
    return weights(folder / "untouched")


def resume(folder: Path, output: str, values=LAYOUT) -> str:
    """Start the run again and let it end; what was said in all its starts."""
    launch = Launch(folder, output, values)
    assert launch.gone(300) is not None and launch.launcher.returncode == 0, launch.said()[-4000:]
    return launch.said()


def fault(folder: Path, output: str, steps: int, strike, values=LAYOUT, start=None) -> Launch:
    """Start a run, `strike(launch)` once it has logged so many steps, and see all its processes go."""
    launch = Launch(folder, output, values, start)
    try:
        assert launch.until(lambda: launch.steps() >= steps, START_SECONDS), launch.said()[-4000:]
        strike(launch)
        assert launch.gone() is not None, f"still there: {launch.processes()}\n{launch.said()[-4000:]}"
    finally:
        launch.end()
    assert launch.launcher.returncode != 0
    return launch


def test_a_killed_rank(folder, untouched):
    launch = fault(folder, "killed", 5, lambda launch: launch.ranks()[1].kill())
    assert "rank(s) [1] are gone" in launch.said() or "another rank exited" in launch.said()
    assert "resuming from" in resume(folder, "killed")
    assert weights(folder / "killed") == untouched


def test_sigterm_saves_and_stops(folder, untouched):
    """As a scheduler sends it to the launcher, which passes it on to one rank after another."""
    launch = fault(folder, "terminated", 3, lambda launch: launch.launcher.terminate())
    last = step_of(checkpoints(folder / "terminated")[0])
    assert f"stopped after step {last}" in launch.said() and "Traceback" not in launch.said()
    assert f"checkpoint-{last}\n" in resume(folder, "terminated")
    assert weights(folder / "terminated") == untouched


def test_sigterm_before_anything_has_begun(folder):
    """While libraries are imported and data is read there is nothing to save, and nobody may stay."""
    launch = Launch(folder, "early", LAYOUT)
    try:
        assert launch.until(lambda: len(launch.ranks()) == 2, START_SECONDS), launch.said()
        launch.launcher.terminate()
        assert launch.gone() is not None, f"still there: {launch.processes()}"
    finally:
        launch.end()
    assert not list((folder / "early").glob("checkpoint-*")), launch.said()[-3000:]


def test_sigterm_to_one_rank_stops_all(folder):
    launch = fault(folder, "one-rank", 3, lambda launch: launch.ranks()[1].terminate())
    last = step_of(checkpoints(folder / "one-rank")[0])
    assert f"stopped after step {last}" in launch.said()


EVALUATED = LAYOUT | {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1, "max_steps": 4}


def test_sigterm_during_an_evaluation(folder):
    """The evaluation is cut, the checkpoint owes it, and the resumed run makes it first."""
    values = EVALUATED | {"eval_data": folder / "train.jsonl", "save_steps": 1000}
    launch = fault(folder, "evaluating", 2, lambda launch: launch.ranks()[1].terminate(), values)
    assert "stopped after step 2;" in launch.said() and "Traceback" not in launch.said()
    assert not any("eval_nll" in row for row in metrics(folder / "evaluating"))
    assert checkpoints(folder / "evaluating") == [folder / "evaluating/checkpoint-2"]
    assert "checkpoint-2\n" in resume(folder, "evaluating", values)
    assert [row["step"] for row in metrics(folder / "evaluating") if "eval_nll" in row] == [2, 4]


def test_sigterm_during_the_evaluation_before_the_first_step(folder):
    values = EVALUATED | {"eval_data": folder / "train.jsonl", "eval_on_start": True}
    launch = Launch(folder, "evaluating-first", values)
    try:
        assert launch.until((launch.output / "deepspeed.json").exists, START_SECONDS), launch.said()
        launch.ranks()[0].terminate()
        assert launch.gone() is not None, f"still there: {launch.processes()}"
    finally:
        launch.end()
    assert "stopped before the first step; no progress was lost" in launch.said() and "Traceback" not in launch.said()
    assert not checkpoints(folder / "evaluating-first")


def test_a_run_started_by_hand_outlives_its_shell(folder):
    """As with nohup: a shell is no launcher."""
    shell = ["sh", "-c", '"$@" & wait', "sh", sys.executable, SCRIPT]
    launch = fault(folder, "by-hand", 3, lambda launch: launch.launcher.kill(), {"tp": 1}, shell)
    assert "the launcher is gone" not in launch.said() and (folder / "by-hand/model").exists()


def test_a_run_of_one_process_listens_for_nobody(folder):
    launch = Launch(folder, "alone", {"tp": 1, "max_steps": 3}, [sys.executable, SCRIPT])
    heard = set()

    def listening() -> bool:
        with suppress(psutil.Error):
            heard.update(c.laddr.ip for c in launch.launcher.net_connections() if c.status == psutil.CONN_LISTEN)
        return launch.steps() >= 3

    try:
        assert launch.until(listening, START_SECONDS), launch.said()[-4000:]
        assert launch.gone(START_SECONDS) is not None
    finally:
        launch.end()
    assert heard <= {"127.0.0.1", "::1"}


def test_a_rank_that_stands_still_is_named(folder):
    values = LAYOUT | {"stall_timeout": 10, "save_steps": 1000}  # while it saves, it would be given longer
    launch = fault(folder, "stalled", 3, lambda launch: launch.ranks()[1].send_signal(signal.SIGSTOP), values)
    said = launch.said()
    assert "no progress for" in said and "rank 1 does not answer: stopped" in said
    assert "rank 0 waits in all_" in said or "rank 0 waits in _all_" in said


def raising(folder: Path, output: str, method: str, fault: str, step: int = 3) -> str:
    """A run whose rank 1 raises `fault` in a method of its Trainer, after `step`. What was said; all processes go."""
    script = folder / f"{output}.py"
    values = {"root": Path(__file__).resolve().parents[2], "method": method, "fault": fault, "step": step}
    script.write_text(RAISING.format(**values))
    launch = Launch(folder, output, LAYOUT, [*launcher(2), str(script)])
    try:
        assert launch.gone(START_SECONDS) is not None, launch.said()[-4000:]
    finally:
        launch.end()
    assert launch.launcher.returncode != 0
    return launch.said()


def test_a_rank_that_raises(folder):
    """Its own traceback stands alone; the other rank says one sentence."""
    said = raising(folder, "raising", "training_step", "ZeroDivisionError('in step 4')")
    assert said.count("Traceback") == 1 and "ZeroDivisionError: in step 4" in said
    assert "another rank exited" in said or "rank(s) [1] are gone" in said


def test_a_rank_without_memory(folder):
    said = raising(folder, "memory", "training_step", "torch.OutOfMemoryError('Tried to allocate 2 GiB')")
    assert (
        "error: rank 1 has no memory left (Tried to allocate 2 GiB); to use less: a smaller --per_device" in said
    )
    assert "Traceback" not in said


def test_a_rank_that_raises_before_the_first_step(folder):
    """It says so itself; its whole traceback is in a file."""
    said = raising(folder, "starting", "create_optimizer", "RuntimeError('no such optimizer')", step=0)
    assert "error: rank 1: the run cannot start as configured: RuntimeError: no such optimizer" in said
    assert "Traceback" not in said
    assert "RuntimeError: no such optimizer" in (folder / "starting/traceback-1.txt").read_text()


def test_a_mistake_on_one_rank_alone(folder):
    """As on two nodes, of which one lacks the data: that rank says so, though it is not the first."""
    script = folder / "nodes.py"
    script.write_text(f"import os\nif os.environ['RANK'] == '1':\n    os.chdir('/')\n{STARTED}")
    (folder / "here.jsonl").write_text((folder / "train.jsonl").read_text())
    start = ["sh", "-c", f'cd {folder} && exec "$@"', "sh", *launcher(2), str(script)]
    launch = Launch(folder, "nodes", LAYOUT | {"data": "here.jsonl"}, start)
    try:
        assert launch.gone(START_SECONDS) is not None, launch.said()[-4000:]
    finally:
        launch.end()
    assert launch.launcher.returncode == 2 and "Traceback" not in launch.said()
    assert "error: rank 1: 'here.jsonl' should be a data file or directory, but there is none" in launch.said()


def test_a_value_that_a_library_refuses(folder):
    """On all ranks alike: said once, as a mistake, before anything is trained."""
    launch = Launch(folder, "refused", LAYOUT | {"lr_scheduler_kwargs": '{"foo": 1}'})
    try:
        assert launch.gone(START_SECONDS) is not None, launch.said()[-4000:]
    finally:
        launch.end()
    said = launch.said()
    assert launch.launcher.returncode == 2 and "Traceback" not in said
    assert said.count("the run cannot start as configured: TypeError: ") == 1 and "argument 'foo'" in said
    assert "foo" in (folder / "refused/traceback-0.txt").read_text()
    assert resume(folder, "refused") and not (folder / "refused/traceback-0.txt").exists()


STARTED = f"""
import sys
sys.path[0] = "{Path(__file__).resolve().parents[2]}"
import launch.sft
from launch.process.exit import run_to_its_end

run_to_its_end(launch.sft.main, sys.argv[1:])
"""
RAISING = """
import os, sys
sys.path[0] = "{root}"
import launch.sft
import torch
from launch.process.exit import run_to_its_end
from launch.training.trainer import SftTrainer

plain = SftTrainer.{method}

def raises(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and self.state.global_step == {step}:
        raise {fault}
    return plain(self, *args, **kwargs)

SftTrainer.{method} = raises
run_to_its_end(launch.sft.main, sys.argv[1:])
"""
