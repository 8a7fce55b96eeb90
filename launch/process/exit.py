"""How a process of a run ends: exit codes, sentences for mistakes and mishaps, and nobody left waiting."""

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

# What gloo, NCCL and the store say to the ranks that outlive another.
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
ALIKE_SECONDS = 3.0  # until the launcher has ended a rank, where another one ended first
NO_MEMORY = "DefaultCPUAllocator: "  # what torch says on a CPU
LESS_MEMORY = (
    "what takes less: a smaller --per_device_train_batch_size with more --gradient_accumulation_steps, "
    "--gradient_checkpointing true, more --tp or a higher --zero; `--sanity` estimates it"
)


def run_to_its_end(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """`main(argv)`, then the end: 0 when it is done, 2 after a mistake, 1 after a mishap, 128 + n after signal n.

    The process leaves at once, without destructors. After a mishap another rank may be in a collective, and the
    launcher ends the others when it sees this one gone; and where all is done, threads of libraries that Python takes
    down in the middle of their C++ would now and then abort what has succeeded.
    """
    code = 1
    try:
        main(argv)
        leave()
        code = 0
        atexit._run_exitfuncs()  # what trackers finish their runs with
    except Stopped as stop:
        code = stop.code
        _tell(str(stop), everywhere=False)
    except UserError as fault:
        code = 2
        _tell_mistake(str(fault))
    except UnsupportedModel as fault:
        code = 2
        _tell_mistake(f"{fault} (the flag is --head)")
    except LocalError as fault:
        _tell(f"error: rank {rank()}: {fault}", everywhere=True)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception as fault:
        if sentence := _mishap(fault):
            _tell(sentence, everywhere=True)
            if _peer_lost(fault):
                time.sleep(ALIKE_SECONDS)
        else:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def has_its_sentence(fault: Exception) -> bool:
    """Whether `run_to_its_end` says more of it than a traceback would."""
    return isinstance(fault, Stopped | UserError | UnsupportedModel | LocalError) or _mishap(fault) is not None


def _mishap(fault: Exception) -> str | None:
    """What to say of an error that is nobody's mistake here, or None."""
    text = str(fault)
    if isinstance(fault, OSError | SafetensorError):
        return f"error: rank {rank()}: a file could not be read or written: {text}"
    if isinstance(fault, torch.OutOfMemoryError | MemoryError) or NO_MEMORY in text:
        return f"error: rank {rank()} has no memory left ({error_line(fault)}); {LESS_MEMORY}"
    if _peer_lost(fault):
        reason = error_line(fault, 200)
        return f"rank {rank()}: another rank is gone, this one stops; what it said stands above (seen here: {reason})"
    return None


def _peer_lost(fault: Exception) -> bool:
    """Whether another rank's end is what this one saw: the exit code is to be that one's."""
    return any(words in str(fault) for words in PEER_LOST)


def _tell_mistake(text: str) -> None:
    """On rank 0; on another one if it lives on, since then rank 0 did not make the mistake too."""
    if not is_main():
        time.sleep(ALIKE_SECONDS)
    _tell(f"error: {text}" if is_main() else f"error: rank {rank()}: {text}", everywhere=True)


def _tell(text: str, everywhere: bool) -> None:
    if everywhere or is_main():
        print(printable(text), file=sys.stderr, flush=True)
