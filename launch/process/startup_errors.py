"""Until the first step is done, what a library refuses is a mistake in the flags: a sentence, not a crash."""

import traceback
from contextlib import suppress
from pathlib import Path

from transformers import TrainerCallback

from launch.common.atomic_files import write_whole
from launch.common.errors import UserError
from launch.common.messages import typed_error_line
from launch.common.paths import TRACEBACK
from launch.process.exit import has_its_sentence
from launch.process.ranks import rank


class Starting(TrainerCallback):
    """Entered while a run is set up and trained; what is raised before its first step is done is a `UserError`.

    The whole traceback is written into the run's directory, in case that the mistake is not the user's.
    """

    def __init__(self, run: Path):
        self.run = run
        self.over = False

    def on_step_end(self, args, state, control, **kwargs):
        self.over = True

    def __enter__(self) -> "Starting":
        return self

    def __exit__(self, _type, fault: BaseException | None, _traceback) -> None:
        if self.over or not isinstance(fault, Exception) or has_its_sentence(fault):
            return
        file = self.run / TRACEBACK.format(rank=rank())
        with suppress(OSError):
            write_whole(file, "".join(traceback.format_exception(fault)))
        reason = typed_error_line(fault)
        raise UserError(
            f"the run cannot start as it was asked to: {reason}; all of the error is in {file}"
        ) from fault
