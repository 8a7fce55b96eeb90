"""Several runs of `launch/sft.py` in one set of processes, under the real launcher.

`deepspeed --num_gpus N tests/support/run_many.py runs.json`, where `runs.json` is a list of argument lists.
"""

import gc
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.process.exit import run_to_its_end
from launch.sft import main


def every(argv: list[str]) -> None:
    """Run `launch/sft.py`'s main with each list of arguments, one after another."""
    for arguments in json.loads(Path(argv[-1]).read_text()):
        main(arguments)
        gc.collect()


run_to_its_end(every, sys.argv[1:])
