"""Several runs of `launch/sft.py` in one set of processes.

`deepspeed --num_gpus N tests/support/run_many.py runs.json`

`runs.json` is a list of argument lists. Importing everything once is what makes a dozen runs affordable; each
is still the real `main` with the real launcher, DeepSpeed engine and files.
"""

import gc
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from launch.process.exit import run_to_its_end
from launch.sft import main


def every(argv: list[str]) -> None:
    for arguments in json.loads(Path(argv[-1]).read_text()):
        main(arguments)
        gc.collect()


run_to_its_end(every, sys.argv[1:])
