"""Errors raised before the first optimizer step are reported as one-line user errors, not tracebacks."""

import traceback
from contextlib import suppress
from pathlib import Path

from transformers import TrainerCallback

from launch.common.atomic_files import write_whole
from launch.common.errors import UserError
from launch.common.messages import typed_error_line
from launch.common.paths import TRACEBACK
from launch.process.exit import has_one_line
from launch.process.ranks import rank


class StartupErrors(TrainerCallback):
    """Entered while a run is set up and trained; turns errors before the end of the first step into `UserError`.

    What a library refuses there is nearly always a flag. The traceback is written into the run's directory, in
    case it is not.
    """

    def __init__(self, run: Path):
        self.run = run
        self.over = False

    def on_step_end(self, args, state, control, **kwargs):
        self.over = True

    def __enter__(self) -> "StartupErrors":
        return self

    def __exit__(self, _type, error: BaseException | None, _traceback) -> None:
        if self.over or not isinstance(error, Exception) or has_one_line(error):
            return
        file = self.run / TRACEBACK.format(rank=rank())
        with suppress(OSError):
            write_whole(file, "".join(traceback.format_exception(error)))
        reason = typed_error_line(error)
        raise UserError(f"the run cannot start as configured: {reason}; the full traceback is in {file}") from error
