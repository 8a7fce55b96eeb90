"""Runs that die: a killed rank, signals, a rank that raises or stands still. No process is left, nothing is lost.

What a launcher does to its ranks, and what happens before they are imported, is tried with deepspeed's own launcher
(`Launch`); what the ranks do themselves, with forked ones (`ForkedLaunch`). `make torture` kills fifty times, at
random moments.
"""

import signal
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from launch.run.checkpoints import checkpoints, step_of
from tests.support.launches import LAYOUTS, SCRIPT, ForkedLaunch, Launch, prepare, weights
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
    finish(ForkedLaunch(folder, "untouched", LAYOUT))
    return weights(folder / "untouched")


def finish(launch: Launch) -> str:
    """Let a run end well; what was printed in all its starts."""
    assert launch.gone(300) is not None and launch.launcher.returncode == 0, launch.said()[-4000:]
    return launch.said()


def strike(launch: Launch, steps: int, blow) -> str:
    """`blow(launch)` once it has logged so many steps; all its processes go. What was printed in all its starts."""
    try:
        assert launch.until(lambda: launch.steps() >= steps, START_SECONDS), launch.said()[-4000:]
        blow(launch)
        assert launch.gone() is not None, f"still there: {launch.processes()}\n{launch.said()[-4000:]}"
    finally:
        launch.end()
    assert launch.launcher.returncode != 0
    return launch.said()


def test_a_killed_rank(folder, untouched):
    said = strike(Launch(folder, "killed", LAYOUT), 5, lambda launch: launch.ranks()[1].kill())
    assert "rank 1 is gone" in said or "another rank exited" in said
    assert "resuming from" in finish(Launch(folder, "killed", LAYOUT))
    assert weights(folder / "killed") == untouched


def test_sigterm_saves_and_stops(folder, untouched):
    """As a scheduler sends it to the launcher, which passes it on to one rank after another."""
    said = strike(Launch(folder, "terminated", LAYOUT), 3, lambda launch: launch.launcher.terminate())
    last = step_of(checkpoints(folder / "terminated")[0])
    assert f"stopped after step {last}" in said and "Traceback" not in said
    assert f"checkpoint-{last}\n" in finish(ForkedLaunch(folder, "terminated", LAYOUT))
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
    said = strike(ForkedLaunch(folder, "one-rank", LAYOUT), 3, lambda launch: launch.ranks()[1].terminate())
    last = step_of(checkpoints(folder / "one-rank")[0])
    assert f"stopped after step {last}" in said


EVALUATED = LAYOUT | {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1, "max_steps": 4}


UNHURRIED = """
import time
from launch.process.watchdog import Watchdog

Watchdog.on_prediction_step = lambda self, *args, **kwargs: time.sleep(0.05)
"""  # two seconds for an evaluation, in which a signal surely falls


def test_sigterm_during_an_evaluation(folder):
    """The evaluation is cut, the checkpoint owes it, and the resumed run makes it first."""
    values = EVALUATED | {"eval_data": folder / "train.jsonl", "save_steps": 1000}
    launch = ForkedLaunch(folder, "evaluating", values, UNHURRIED)
    said = strike(launch, 2, lambda launch: launch.ranks()[1].terminate())
    assert "stopped after step 2;" in said and "Traceback" not in said
    assert not any("eval_nll" in row for row in metrics(folder / "evaluating"))
    assert checkpoints(folder / "evaluating") == [folder / "evaluating/checkpoint-2"]
    assert "checkpoint-2\n" in finish(ForkedLaunch(folder, "evaluating", values))
    assert [row["step"] for row in metrics(folder / "evaluating") if "eval_nll" in row] == [2, 4]


def test_sigterm_during_an_evaluation_that_decides_what_is_saved(folder):
    values = EVALUATED | {"eval_data": folder / "train.jsonl", "save_strategy": "best"}
    launch = ForkedLaunch(folder, "evaluating-best", values, UNHURRIED)
    strike(launch, 2, lambda launch: launch.ranks()[1].terminate())
    assert checkpoints(folder / "evaluating-best") == [folder / "evaluating-best/checkpoint-2"]


def test_sigterm_during_the_evaluation_before_the_first_step(folder):
    values = EVALUATED | {"eval_data": folder / "train.jsonl", "eval_on_start": True}
    launch = ForkedLaunch(folder, "evaluating-first", values, UNHURRIED)
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
    said = strike(Launch(folder, "by-hand", {"tp": 1}, shell), 3, lambda launch: launch.launcher.kill())
    assert "the launcher is gone" not in said and (folder / "by-hand/model").exists()


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
    launch = ForkedLaunch(folder, "stalled", values)
    said = strike(launch, 3, lambda launch: launch.ranks()[1].send_signal(signal.SIGSTOP))
    assert "no progress for" in said and "rank 1 does not answer: stopped" in said
    assert "rank 0 waits in all_" in said or "rank 0 waits in _all_" in said
    assert launch.launcher.returncode == 1


def failing(launch: Launch) -> str:
    """A run that fails by itself. What was printed; all processes go."""
    try:
        assert launch.gone(START_SECONDS) is not None, launch.said()[-4000:]
    finally:
        launch.end()
    assert launch.launcher.returncode != 0
    return launch.said()


def raising(folder: Path, output: str, method: str, error: str, step: int = 3) -> str:
    """A run whose rank 1 raises `error` in a method of its Trainer, after `step`."""
    before = RAISING.format(method=method, error=error, step=step)
    return failing(ForkedLaunch(folder, output, LAYOUT, before))


def test_a_rank_that_raises(folder):
    """Its own traceback stands alone; the other rank says one sentence, or none if the launcher ends it first."""
    said = raising(folder, "raising", "training_step", "ZeroDivisionError('in step 4')")
    assert said.count("Traceback") == 1 and "ZeroDivisionError: in step 4" in said
    assert said.count("another rank exited") + said.count("rank 1 is gone") <= 1


def test_a_rank_without_memory(folder):
    said = raising(folder, "memory", "training_step", "torch.OutOfMemoryError('Tried to allocate 2 GiB')")
    assert "error: rank 1 has no memory left (Tried to allocate 2 GiB); to use less: a smaller --per_device" in said
    assert "Traceback" not in said


def test_a_rank_that_raises_before_the_first_step(folder):
    """It says so itself; its whole traceback is in a file."""
    said = raising(folder, "starting", "create_optimizer", "RuntimeError('no such optimizer')", step=0)
    assert "error: rank 1: the run cannot start as configured: RuntimeError: no such optimizer" in said
    assert "Traceback" not in said
    assert "RuntimeError: no such optimizer" in (folder / "starting/traceback-1.txt").read_text()


def test_a_mistake_on_one_rank_alone(folder):
    """As on two nodes, one of which lacks the data: that rank says so, though it is not the first."""
    before = f"""
import os
from launch.process import identity
if os.environ['RANK'] == '1':
    identity.machine = lambda: "another"
os.chdir('/' if os.environ['RANK'] == '1' else {str(folder)!r})
"""
    (folder / "here.jsonl").write_text((folder / "train.jsonl").read_text())
    launch = ForkedLaunch(folder, "nodes", LAYOUT | {"data": "here.jsonl"}, before)
    said = failing(launch)
    assert launch.launcher.returncode == 2 and "Traceback" not in said
    assert "error: rank 1: 'here.jsonl' was expected to be a data file or directory, but does not exist" in said


def test_a_value_that_a_library_refuses(folder):
    """On all ranks alike: reported once, as a user error, before anything is trained."""
    values = LAYOUT | {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"foo": 1}'}
    launch = ForkedLaunch(folder, "refused", values, "from launch.process import exit; exit.ALIKE_SECONDS = 60")
    said = failing(launch)
    assert launch.launcher.returncode == 2 and "Traceback" not in said
    assert said.count("the run cannot start as configured: ValueError: ") == 1 and "foo" in said
    assert "foo" in (folder / "refused/traceback-0.txt").read_text()
    assert finish(ForkedLaunch(folder, "refused", LAYOUT)) and not (folder / "refused/traceback-0.txt").exists()


RAISING = """
import os
import torch
from launch.training.trainer import SftTrainer

plain = SftTrainer.{method}

def raises(self, *args, **kwargs):
    if os.environ["RANK"] == "1" and self.state.global_step == {step}:
        raise {error}
    return plain(self, *args, **kwargs)

SftTrainer.{method} = raises
"""
