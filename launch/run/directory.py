"""The directory of a run: made anew, gone on with by the same command, never overwritten."""

import fcntl
import json
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml

from launch.common.atomic_files import write_whole
from launch.common.errors import UserError
from launch.common.paths import (
    CHECKPOINT_PARTIAL,
    DEEPSPEED,
    DROPPED,
    LOCK,
    METRICS,
    MODEL,
    MODEL_PARTIAL,
    PARTIAL,
    RECIPE,
    REMOVED,
    RUNS,
    SAMPLES,
    TENSORBOARD,
    TRACEBACKS,
    UNIVERSAL_PARTIAL,
    WEIGHTS,
)
from launch.process.ranks import from_main, on_all_ranks, rank, say
from launch.run import checkpoints, universal

_locks: dict[Path, IO] = {}
WRITTEN = (LOCK, RECIPE, METRICS, DEEPSPEED, SAMPLES, DROPPED, TENSORBOARD)

# Keys that may change from one start of a run to the next: what it shows and keeps, how far it goes, and how the same
# computation is laid out (`_check_facts` looks at that).
# fmt: off
FREE = {
    "logging_steps", "report_to", "samples", "run_name", "disable_tqdm", "log_level",
    "eval_steps", "eval_strategy", "eval_on_start", "do_eval", "per_device_eval_batch_size",
    "save_steps", "save_strategy", "save_total_limit", "resume_from_checkpoint", "stall_timeout", "on_nonfinite",
    "max_steps", "num_train_epochs",
    "tp", "zero", "offload", "deepspeed", "head", "chunk_bytes", "gradient_checkpointing",
    "per_device_train_batch_size", "gradient_accumulation_steps",
    "dataloader_num_workers", "dataloader_prefetch_factor",
}
# fmt: on


@dataclass(frozen=True)
class Run:
    """Where a run writes, and the checkpoint that it goes on from, if any.

    `converted`: the checkpoint is a copy in DeepSpeed's universal format, since it was written under another layout.
    `evaluation_owed`: the evaluation that was due at its step was left out.
    """

    path: Path
    checkpoint: Path | None = None
    converted: bool = False
    finished: bool = False
    evaluation_owed: bool = False


def open_run(wanted: str | None, recipe: dict, checkpoint: str | None, facts: dict) -> Run:
    """`wanted` (None: the next free number in `runs/`), claimed for this recipe on all ranks.

    A directory of the same recipe is gone on with, from its last whole checkpoint; a finished one is left alone. An
    explicit `checkpoint` is where a directory without any starts from. Raises `UserError` if `wanted` holds something
    else, another recipe, or a checkpoint that is not whole, or one of a run that these `facts` do not go on with.
    """
    path, known = from_main(lambda: _claim(wanted, recipe))
    from_main(lambda: _lock(path))
    on_all_ranks(lambda: _check_shared(path))
    if from_main(lambda: _is_finished(path)):
        return Run(path, finished=True)
    last = checkpoints.last_whole(path) if known else None
    if last is None and checkpoint is not None:
        last = _given(Path(checkpoint))
    elif last is not None and checkpoint is not None:
        say(f"--resume_from_checkpoint is for a directory without checkpoints; {path} has its own")
    before = {} if last is None else from_main(lambda: checkpoints.facts_of(last))
    changes = [] if last is None else from_main(lambda: _check_facts(last, before, facts))
    owed = before.get("evaluation_owed", False)
    from_main(lambda: _settle(path, recipe, last))
    if known:
        say(f"going on from {last}" if last else f"{path} holds no whole checkpoint yet: starting from the beginning")
    if not changes:
        return Run(path, last, evaluation_owed=owed)
    say(f"it was written under another layout and is converted: {', '.join(changes)}")
    converted = from_main(lambda: universal.convert(last, path))
    return Run(path, converted, converted=True, evaluation_owed=owed)


def _claim(wanted: str | None, recipe: dict) -> tuple[Path, bool]:
    """The directory, and whether it is this recipe's already."""
    try:
        return (_next_numbered(), False) if wanted is None else _claim_named(Path(wanted).expanduser(), recipe)
    except (OSError, ValueError, RuntimeError) as fault:
        raise UserError(f"--output_dir {str(wanted or RUNS)[:200]!r} cannot be written to: {fault}") from None


def _claim_named(path: Path, recipe: dict) -> tuple[Path, bool]:
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path} is a file; name a directory")
    path.mkdir(parents=True, exist_ok=True)
    entries = list(path.iterdir())
    if linked := sorted(entry.name for entry in entries if _leads_away(entry)):
        raise UserError(
            f"--output_dir {path} has symbolic links where a run writes ({', '.join(linked)}), and it writes nowhere "
            "else; remove them, or name another directory"
        )
    if any(not entry.name.startswith(".") for entry in entries):
        if not (path / RECIPE).is_file():
            raise UserError(f"--output_dir {path} holds files that are no run of this recipe; name another directory")
        if (path / MODEL).exists() or checkpoints.checkpoints(path):  # else a mended mistake starts it anew
            _compare(path, recipe)
        return path, True
    return path, False


def _leads_away(entry: Path) -> bool:
    """Whether a run would write through this; a model or checkpoint that lies elsewhere is read and left alone."""
    written = entry.name in WRITTEN or entry.name.endswith(PARTIAL) or (entry.name == MODEL and not entry.exists())
    return written and entry.is_symlink()


def _is_finished(path: Path) -> bool:
    """Whether there is a model. Export writes one whole or not at all; what else has its name is the user's."""
    model = path / MODEL
    if model.exists() and not ((model / "config.json").is_file() and list(model.glob(WEIGHTS))):
        raise UserError(f"{model} is no whole model (config.json and {WEIGHTS}): remove it, and start again")
    return model.exists()


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
            f"--output_dir {path} is in use by another run; wait for its end, or name another directory"
        ) from None
    except OSError:  # this file system knows no locks
        pass
    _locks[path.resolve()] = file


def _check_shared(path: Path) -> None:
    if not (path / LOCK).exists():
        raise UserError(
            f"rank {rank()} on {socket.gethostname()} does not see {path.resolve()}, which rank 0 has made: each "
            "rank writes its part of a checkpoint, so name an --output_dir on storage that all nodes share"
        )


def _next_numbered() -> Path:
    RUNS.mkdir(exist_ok=True)
    numbers = [int(entry.name) for entry in RUNS.iterdir() if entry.name.isdigit()]
    number = max(numbers, default=0) + 1
    while True:
        try:
            (RUNS / f"{number:04d}").mkdir()
            return RUNS / f"{number:04d}"
        except FileExistsError:  # another run took it meanwhile
            number += 1


def _compare(path: Path, recipe: dict) -> None:
    """Raise if the run in `path` was told to learn something else; say what else has changed."""
    try:
        before = yaml.safe_load((path / RECIPE).read_text(encoding="utf-8"))
        changed = {key for key in before.keys() | recipe.keys() if before.get(key) != recipe.get(key)}
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as fault:
        raise UserError(f"{path / RECIPE} cannot be read ({fault}); name another --output_dir") from None
    words = {key: f"{key}: {before.get(key)} before, {recipe.get(key)} now" for key in sorted(changed)}
    if other := [text for key, text in words.items() if key not in FREE]:
        raise UserError(
            f"--output_dir {path} holds a run of another recipe; use its own, or name another directory:\n  "
            + "\n  ".join(other)
        )
    for text in words.values():
        say(f"changed since {path} was started: {text}")


def _given(checkpoint: Path) -> Path:
    if not from_main(lambda: (checkpoint / "trainer_state.json").is_file()):
        raise UserError(f"--resume_from_checkpoint {checkpoint} holds no checkpoint; name a checkpoint-N directory")
    if fault := checkpoints.damage(checkpoint):
        raise UserError(f"--resume_from_checkpoint {checkpoint} is not whole: {fault}; name an earlier one")
    return checkpoint


def _check_facts(checkpoint: Path, before: dict, facts: dict) -> list[str]:
    """What of the layout has changed. Raises `UserError` if this run does not go on where the checkpoint stands."""
    if missing := facts.keys() - before.keys():
        raise UserError(
            f"{checkpoint} does not say its {', '.join(sorted(missing))}: it was written by another version of this "
            "project; go on with that one, or name another --output_dir"
        )
    if before["data"] != facts["data"]:
        raise UserError(
            f"the rows to train on are not those that {checkpoint} was made with (--data has changed, or how it is "
            "tokenised); bring them back, or name another --output_dir"
        )
    if before["rows_a_step"] != facts["rows_a_step"]:
        raise UserError(
            f"{checkpoint} was made with {before['rows_a_step']} rows a step, and this run would take "
            f"{facts['rows_a_step']}; change --per_device_train_batch_size or --gradient_accumulation_steps so that "
            "rows x accumulation x data-parallel ranks stay the same"
        )
    return universal.changes(before, facts)


def _settle(path: Path, recipe: dict, checkpoint: Path | None) -> None:
    """Write the recipe, remove what an interrupted start left, and forget metrics past the checkpoint."""
    shutil.rmtree(path / CHECKPOINT_PARTIAL, ignore_errors=True)
    shutil.rmtree(path / UNIVERSAL_PARTIAL, ignore_errors=True)
    shutil.rmtree(path / MODEL_PARTIAL, ignore_errors=True)
    for leftover in path.glob(f"{REMOVED}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in path.glob(TRACEBACKS):
        leftover.unlink()
    write_whole(path / RECIPE, yaml.safe_dump(recipe, sort_keys=True))
    if (path / METRICS).exists():
        step = 0 if checkpoint is None else checkpoints.step_of(checkpoint)
        write_whole(path / METRICS, "".join(_metrics_until(path / METRICS, step)) if checkpoint else "")


def _metrics_until(path: Path, step: int) -> list[str]:
    """Whole lines of steps up to `step`: an interrupted run leaves half a line, and lines of steps now undone."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return kept
