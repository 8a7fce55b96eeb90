"""How a process of a run ends: its exit code, a one-line error where that says enough, and no rank left waiting."""

import atexit
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

import torch
from safetensors import SafetensorError

from launch.common.errors import LocalError, UserError
from launch.common.messages import error_line, printable
from launch.process.ranks import is_main, leave, rank
from launch.process.signals import Stopped
from smoothing import UnsupportedModel

# Parts of the errors that gloo, NCCL and the store raise on a rank when another one has exited.
PEER_LOST = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection was likely closed",
    "recvValue failed",
    "ncclRemoteError",
    "remote process exited",
    "communicator was aborted",
)
ALIKE_SECONDS = 3.0  # in which the launcher ends this rank if another one exited first
NO_MEMORY = "DefaultCPUAllocator: "  # in torch's error on a CPU
LESS_MEMORY = (
    "to use less: a smaller --per_device_train_batch_size with more --gradient_accumulation_steps, "
    "--gradient_checkpointing true, more --tp or a higher --zero; `--sanity` estimates it"
)


def run_to_its_end(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Run `main(argv)` and exit: 0 on success, 2 after a `UserError`, 1 after another error, 128 + n after signal n.

    The process exits at once, without destructors. After an error another rank may wait in a collective, and the
    launcher ends the others when it sees this one exit; and after success, library threads that Python stops inside
    their C++ would now and then abort the process.
    """
    code = 1
    try:
        main(argv)
        leave()
        code = 0
        atexit._run_exitfuncs()  # experiment trackers finish their runs there
    except Stopped as stop:
        code = stop.code
        _tell(str(stop), everywhere=False)
    except UserError as error:
        code = 2
        _tell_user_error(str(error))
    except UnsupportedModel as error:
        code = 2
        _tell_user_error(f"{error} (the flag is --head)")
    except LocalError as error:
        _tell(f"error: rank {rank()}: {error}", everywhere=True)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception as error:
        if problem := _environment_problem(error):
            _tell(problem, everywhere=True)
            if _peer_lost(error):
                time.sleep(ALIKE_SECONDS)
        else:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def has_one_line(error: Exception) -> bool:
    """Return whether `run_to_its_end` reports this error in one line instead of a traceback."""
    return (
        isinstance(error, Stopped | UserError | UnsupportedModel | LocalError)
        or _environment_problem(error) is not None
    )


def _environment_problem(error: Exception) -> str | None:
    """Return a line for an error of files, memory or another rank, which has no cause in the flags; else None."""
    text = str(error)
    if isinstance(error, OSError | SafetensorError):
        return f"error: rank {rank()}: a file could not be read or written: {text}"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or NO_MEMORY in text:
        return f"error: rank {rank()} has no memory left ({error_line(error)}); {LESS_MEMORY}"
    if _peer_lost(error):
        reason = error_line(error, 200)
        return f"rank {rank()}: another rank exited, so this rank stops; see that rank's error above (here: {reason})"
    return None


def _peer_lost(error: Exception) -> bool:
    """Return whether this error is only that another rank exited; the exit code should be that rank's."""
    return any(words in str(error) for words in PEER_LOST)


def _tell_user_error(text: str) -> None:
    """Print on rank 0; on another rank only if it is still alive, since rank 0 then did not have the same error."""
    if not is_main():
        time.sleep(ALIKE_SECONDS)
    _tell(f"error: {text}" if is_main() else f"error: rank {rank()}: {text}", everywhere=True)


def _tell(text: str, everywhere: bool) -> None:
    if everywhere or is_main():
        print(printable(text), file=sys.stderr, flush=True)
