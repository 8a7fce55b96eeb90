"""Until the first step begins, what a library refuses is a mistake in the flags: a sentence, not a crash."""

import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from transformers import TrainerCallback

from launch.ending import has_its_sentence
from launch.errors import UserError
from launch.files import write_whole
from launch.processes import is_main, rank
from launch.text import first_line, printable

WAIT_SECONDS = 3.0  # until the launcher has ended this rank, where rank 0 failed alike


class Starting(TrainerCallback):
    """Entered while a run is set up and trained; what is raised before the first step leaves it as a `UserError`.

    The whole traceback is written into the run's directory, in case that the mistake is not the user's. Of ranks that
    fail alike rank 0 speaks; one that fails alone speaks for itself.
    """

    def __init__(self, run: Path):
        self.run = run
        self.over = False

    def on_step_begin(self, args, state, control, **kwargs):
        self.over = True

    def __enter__(self) -> "Starting":
        return self

    def __exit__(self, _type, fault: BaseException | None, _traceback) -> None:
        if self.over or not isinstance(fault, Exception) or has_its_sentence(fault):
            return
        if not is_main():
            time.sleep(WAIT_SECONDS)
        file = self.run / f"traceback-{rank()}.txt"
        with suppress(OSError):
            write_whole(file, "".join(traceback.format_exception(fault)))
        reason = f"{type(fault).__name__}: {first_line(fault)}"
        text = f"the run cannot be started as it was asked for: {reason}; all of the error is in {file}"
        if not is_main():
            print(printable(f"error: rank {rank()}: {text}"), file=sys.stderr, flush=True)
        raise UserError(text) from fault
