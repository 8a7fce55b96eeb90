"""The directory of a run: created, resumed by the same command, never overwritten."""

from dataclasses import dataclass
from datetime import date
from pathlib import Path

from launch.common.errors import UserError
from launch.process.ranks import from_main, on_all_ranks, say
from launch.run import universal
from launch.run.checkpoints import TRAINER_STATE_NAME, checkpoints, damage, facts_of, last_whole
from launch.run.claim import check_shared, claim, is_finished
from launch.run.compare import check_facts, check_not_further
from launch.run.settle import settle


@dataclass(frozen=True)
class Run:
    """Where a run writes, and which checkpoint it resumes from, if any.

    Attributes:
        path: The run's directory.
        checkpoint: What training resumes from; None for a start from the beginning.
        converted: `checkpoint` is a copy in DeepSpeed's universal format, since it was written under another layout.
        finished: The run has exported its model, and nothing is left to do.
        evaluation_owed: The evaluation due at the checkpoint's step was not made.
    """

    path: Path
    checkpoint: Path | None = None
    converted: bool = False
    finished: bool = False
    evaluation_owed: bool = False


@dataclass(frozen=True)
class _Opened:
    """What the first rank found: the directory, whether its run is known or finished, checkpoints to look at.

    `given`: those that --resume_from_checkpoint names.
    """

    path: Path
    known: bool
    finished: bool
    checkpoints: list[Path]
    given: list[Path]


def open_run(wanted: str | None, recipe: dict, checkpoint: str | None, facts: dict, day: date | None = None) -> Run:
    """Claim a directory for a run of this recipe, on all ranks; resume from its last whole checkpoint.

    The first rank opens the directory and settles it. Between the two all ranks see whether they share it, and
    share the reading of checkpoints, which may be large.

    Args:
        wanted: --output_dir; None for the next free number in `runs/`.
        recipe: What this run is configured to do.
        checkpoint: --resume_from_checkpoint, where a directory without checkpoints starts from: a checkpoint, or a
            run, whose last whole one is taken.
        facts: How this start is laid out over ranks, and its data (`launch.run.layout`).
        day: The date that the run's chat template is told, today's if None.

    Raises:
        UserError: The directory holds something else, another recipe, a damaged model, a finished run that is to go
            further, or a checkpoint that this run cannot resume from.

    Collectives:
        A broadcast and a gather of objects if the run is finished, else a broadcast more; and two for each checkpoint
        that is looked at (a broadcast and a gather), three if it is damaged.
    """
    opened = from_main(lambda: _open(wanted, recipe, checkpoint))
    on_all_ranks(lambda: check_shared(opened.path))
    if opened.finished:
        return Run(opened.path, finished=True)
    last = last_whole(opened.checkpoints)
    if last is None and checkpoint is not None:
        last = _given(checkpoint, opened.given)
    elif last is not None and checkpoint is not None:
        say(f"--resume_from_checkpoint is for a directory without checkpoints; {opened.path} has its own")
    return from_main(lambda: _resume(opened, recipe, last, facts, day or date.today()))


def _open(wanted: str | None, recipe: dict, checkpoint: str | None) -> _Opened:
    path, known = claim(wanted, recipe)
    finished, found = is_finished(path), checkpoints(path) if known else []
    if finished:
        check_not_further(path, recipe, found[0] if found else None)
    return _Opened(path, known, finished, found, [] if checkpoint is None else _named(Path(checkpoint)))


def _named(folder: Path) -> list[Path]:
    """Return the checkpoint that the user names, or the checkpoints of the run, the latest first."""
    if (folder / TRAINER_STATE_NAME).is_file():
        return [folder]
    return checkpoints(folder) if folder.is_dir() else []


def _given(named: str, folders: list[Path]) -> Path:
    """Return the first whole one of the checkpoints that the user names; they stay as they are, whole or not.

    Collectives: those of `damage` for each that is looked at.
    """
    problem = None
    for folder in folders:
        problem = damage(folder)
        if problem is None:
            return folder
        if folder != folders[-1]:
            say(f"{folder} is not whole: {problem}; the checkpoint before it is used")
    if problem is None:
        raise UserError(
            f"--resume_from_checkpoint {named} holds no checkpoint; name a run's directory or one of its "
            "checkpoint-N (the same command with the same --output_dir resumes without it)"
        )
    raise UserError(f"--resume_from_checkpoint {folders[-1]} is not whole: {problem}; name another one")


def _resume(opened: _Opened, recipe: dict, last: Path | None, facts: dict, day: date) -> Run:
    """Compare with the checkpoint, settle the directory, and convert the checkpoint if its layout is another."""
    before = {} if last is None else facts_of(last)
    changes = [] if last is None else check_facts(last, before, facts)
    settle(opened.path, recipe, last, day)
    if last is not None:
        say(f"resuming from {last}")
    elif opened.known:
        say(f"{opened.path} holds no whole checkpoint: starting from the beginning")
    owed = before.get("evaluation_owed", False)
    if not changes:
        return Run(opened.path, last, evaluation_owed=owed)
    say(f"it was written under another layout and is converted: {', '.join(changes)}")
    return Run(opened.path, universal.convert(last, opened.path), converted=True, evaluation_owed=owed)
