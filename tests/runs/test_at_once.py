"""Runs that start at once on one machine, by the documented command."""

import sys
from pathlib import Path

import pytest

from tests.support.launches import SCRIPT, Launch, prepare

pytestmark = pytest.mark.timeout(900)
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
VALUES = {"tp": 2, "max_steps": 2}


def test_two_runs_at_once(tmp_path):
    """Nobody names a port for them, and neither waits for the other or takes its ranks for its own."""
    prepare(tmp_path)
    launches = [Launch(tmp_path, name, VALUES, [DEEPSPEED, "--num_gpus", "2", SCRIPT]) for name in ("one", "other")]
    try:
        for launch in launches:
            assert launch.gone(300) is not None, launch.said()[-4000:]
    finally:
        for launch in launches:
            launch.end()
    for launch in launches:
        assert launch.launcher.returncode == 0 and (launch.output / "model").exists(), launch.said()[-4000:]
