"""What a command prints begins with this project's words."""

import os
import subprocess
import sys

from tests.support.small_run import ROOT


def test_help_without_a_gpu_has_no_words_of_deepspeed():
    env = {name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "RANK")}
    command = [sys.executable, str(ROOT / "launch" / "sft.py"), "--help"]
    result = subprocess.run(command, env=env | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.startswith("usage: deepspeed launch/sft.py")
