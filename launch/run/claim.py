"""Which directory a run writes to, and whether it may: on the first rank, before anything is written there."""

import fcntl
import re
import socket
from pathlib import Path
from typing import IO

from launch.common.errors import UserError
from launch.common.paths import (
    ABOUT,
    DEEPSPEED,
    DROPPED,
    LOCK,
    METRICS,
    MODEL,
    PARTIAL,
    PREVIEW_HTML,
    PREVIEW_JSONL,
    RECIPE,
    REPORT,
    RUNS,
    SAMPLES,
    SMOOTHING_PRIOR,
    STARTED,
    TENSORBOARD,
    WEIGHTS,
)
from launch.model.adapters import ADAPTER_CONFIG
from launch.process.ranks import rank
from launch.run.checkpoints import checkpoints
from launch.run.compare import check_recipe

WRITTEN_FILES = (
    LOCK,
    RECIPE,
    STARTED,
    METRICS,
    DEEPSPEED,
    SAMPLES,
    DROPPED,
    SMOOTHING_PRIOR,
    ABOUT,
    REPORT,
    TENSORBOARD,
)
NUMBER = re.compile("[0-9]{1,9}")  # of a run; a longer one is no count, and its successor may be too long for a name
PREVIEW_FILES = (PREVIEW_HTML, PREVIEW_JSONL)  # may be there before a run is
_locks: dict[Path, IO] = {}


def claim(wanted: str | None, recipe: dict) -> tuple[Path, bool]:
    """Make or find the directory of a run, and lock it until this process ends.

    Returns:
        The directory, and whether a run of this recipe was started there before.

    Raises:
        UserError: The directory cannot be used: it holds something else, or another run is writing there.
    """
    try:
        path, known = (_next_numbered(), False) if wanted is None else _named(Path(wanted).expanduser(), recipe)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--output_dir {str(wanted or RUNS)[:200]!r} cannot be written to: {error}") from None
    _lock(path)
    return path, known


def _named(path: Path, recipe: dict) -> tuple[Path, bool]:
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path} is a file; name a directory")
    path.mkdir(parents=True, exist_ok=True)
    entries = list(path.iterdir())
    if linked := sorted(entry.name for entry in entries if _leads_away(entry)):
        raise UserError(
            f"--output_dir {path} has symbolic links where a run writes ({', '.join(linked)}), and a run writes only "
            "into its own directory; remove them, or name another directory"
        )
    if any(not entry.name.startswith(".") and entry.name not in PREVIEW_FILES for entry in entries):
        if not (path / RECIPE).is_file():
            raise UserError(f"--output_dir {path} holds files that are not a run's; name another directory")
        if (path / MODEL).exists() or checkpoints(path):  # else a run with a corrected recipe starts anew
            check_recipe(path, recipe)
        return path, True
    return path, False


def _leads_away(entry: Path) -> bool:
    """Return whether a run would write through this link; a linked model or checkpoint is only read."""
    written = (
        entry.name in WRITTEN_FILES or entry.name.endswith(PARTIAL) or (entry.name == MODEL and not entry.exists())
    )
    return written and entry.is_symlink()


def _next_numbered() -> Path:
    RUNS.mkdir(exist_ok=True)
    numbers = [int(entry.name) for entry in RUNS.iterdir() if NUMBER.fullmatch(entry.name)]
    number = max(numbers, default=0) + 1
    while True:
        try:
            (RUNS / f"{number:04d}").mkdir()
            return RUNS / f"{number:04d}"
        except FileExistsError:  # another run took it meanwhile
            number += 1


def _lock(path: Path) -> None:
    """Keep every other start out of this directory until this process ends."""
    if path.resolve() in _locks:
        return
    file = (path / LOCK).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"--output_dir {path} is in use by another run; wait until it ends, or name another directory"
        ) from None
    except OSError:  # this file system has no locks
        pass
    _locks[path.resolve()] = file


def is_finished(path: Path) -> bool:
    """Return whether the run has exported its model. Raises `UserError` if what lies there is not a whole one."""
    model = path / MODEL
    described = any((model / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
    if model.exists() and not (described and list(model.glob(WEIGHTS))):
        raise UserError(f"{model} is not a complete model (config.json and {WEIGHTS}): remove it, and start again")
    return model.exists()


def check_shared(path: Path) -> None:
    """Raise `UserError` on a rank that does not see what the first rank has made."""
    if not (path / LOCK).exists():
        raise UserError(
            f"rank {rank()} on {socket.gethostname()} does not see {path.resolve()}, which rank 0 has created: each "
            "rank writes its part of a checkpoint, so name an --output_dir on storage that all nodes share"
        )
