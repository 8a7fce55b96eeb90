"""How a process of a run ends: exit codes, sentences for mistakes and mishaps, and nobody left waiting."""

import atexit
import os
import signal
import sys
import traceback
from collections.abc import Callable

from safetensors import SafetensorError

from launch.errors import LocalError, UserError
from launch.processes import is_main, leave, rank
from launch.stopping import Stopped
from launch.text import printable
from smoothing import UnsupportedModel

# What gloo, NCCL and the store say to the ranks that outlive another.
PEER_LOST = (
    "gloo/transport",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
    "TCPStore",
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
        _tell(f"error: {fault}", everywhere=False)
    except UnsupportedModel as fault:  # all ranks run the same model
        code = 2
        _tell(f"error: {fault} (the flag is --head)", everywhere=False)
    except LocalError as fault:
        _tell(f"error: rank {rank()}: {fault}", everywhere=True)
    except (OSError, SafetensorError) as fault:
        _tell(f"error: rank {rank()}: a file could not be read or written: {fault}", everywhere=True)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception as fault:
        if any(words in str(fault) for words in PEER_LOST):
            _tell(f"rank {rank()}: another rank is gone, this one stops; what it said stands above", everywhere=True)
        else:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _tell(text: str, everywhere: bool) -> None:
    if everywhere or is_main():
        print(printable(text), file=sys.stderr, flush=True)
