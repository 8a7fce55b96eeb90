"""Checkpoints that are whole or absent: written aside, sealed with digests, renamed, and checked before use.

A `checkpoint-N` directory holds a manifest (`launch.run.manifest`). All ranks read and write checkpoints together,
each a share of the files, on storage that all of them see.
"""

import fnmatch
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from launch.common.errors import LocalError, UserError
from launch.common.messages import error_line
from launch.common.paths import CHECKPOINT, CHECKPOINT_PARTIAL, DAMAGED, REMOVED
from launch.common.units import GIB
from launch.process.ranks import from_main, is_main, on_all_ranks, rank, say, world_size
from launch.run.manifest import Entry, Manifest

LATEST = "latest"  # where DeepSpeed names its own directory
MODEL_STATES = "*model_states.pt"
RNG_STATES = "rng_state*.pth"


def step_of(folder: Path) -> int | None:
    """Return the N of a `checkpoint-N`, or None."""
    match = re.fullmatch(CHECKPOINT.format(step="([0-9]+)"), folder.name)
    return int(match[1]) if match else None


def checkpoints(run: Path) -> list[Path]:
    """Return the `checkpoint-N` directories of a run, the latest first."""
    found = [folder for folder in run.iterdir() if folder.is_dir() and step_of(folder) is not None]
    return sorted(found, key=step_of, reverse=True)


@contextmanager
def written_aside(run: Path, name: str, facts: dict) -> Iterator[Path]:
    """Enter to get a directory to write the checkpoint `name` into; then it is sealed and renamed to `run/name`.

    All ranks must enter together. An error while it is written or sealed ends the run with a message, on the rank
    that has it, and leaves the earlier checkpoints as they were.

    Collectives:
        Two broadcasts, and those of `seal`.
    """
    aside = run / CHECKPOINT_PARTIAL
    from_main(lambda: shutil.rmtree(aside, ignore_errors=True))
    try:
        yield aside
        seal(aside / name, facts)
        from_main(lambda: publish(aside / name, run / name))
    except UserError as error:
        raise UserError(_not_written(run, name, error)) from None
    except Exception as error:
        if not _of_writing(error):
            raise
        raise LocalError(_not_written(run, name, error)) from error
    finally:
        if is_main():
            shutil.rmtree(aside, ignore_errors=True)


def seal(folder: Path, facts: dict) -> None:
    """Flush every file to disk and write the manifest. Collectives: two broadcasts and a gather of objects."""
    files = from_main(lambda: _files(folder))
    shares = on_all_ranks(lambda: {name: Entry.of(folder / name, flush=True) for name in _share(files)})
    entries = {name: entry for share in shares for name, entry in share.items()}
    from_main(lambda: _write_manifest(folder, Manifest(facts=facts, files=entries)))


def publish(sealed: Path, final: Path) -> None:
    """Rename a sealed checkpoint to its place, and flush the renaming to disk."""
    old = final.with_name(f"{REMOVED}{final.name}")
    if final.exists():  # of the same step, from before the run was resumed at an earlier one
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    sealed.rename(final)
    _flush_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def rotate(run: Path, keep: int | None, best: str | None) -> None:
    """Remove all but the latest `keep` (at least one) and the best checkpoint. For rank 0."""
    if keep is None:
        return
    for folder in checkpoints(run)[max(1, keep) :]:
        if best is None or folder.resolve() != Path(best).resolve():
            # renamed first, so that a half-removed checkpoint does not look like one
            doomed = run / f"{REMOVED}{folder.name}"
            shutil.rmtree(doomed, ignore_errors=True)
            shutil.rmtree(folder.rename(doomed), ignore_errors=True)


def last_whole(folders: list[Path]) -> Path | None:
    """Return the first of these checkpoints whose files are those that were written.

    Those before it are set aside, each with a message. Collectives: those of `damage` for each checkpoint looked at,
    and a broadcast for each damaged one.
    """
    for folder in folders:
        problem = damage(folder)
        if problem is None:
            return folder
        kept = from_main(lambda folder=folder: _set_aside(folder))
        say(f"{folder} is not whole: {problem}; it is kept as {kept}, and the checkpoint before it is used")
    return None


def damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None. Collectives: a broadcast and a gather of objects."""
    manifest, state_problem = from_main(lambda: _read_small_files(folder))
    if isinstance(manifest, str):
        return manifest
    entries = manifest.files
    shares = on_all_ranks(lambda: {name: entries[name].problem(folder / name) for name in _share(entries)})
    problems = [f"{name} {problem}" for share in shares for name, problem in share.items() if problem]
    return problems[0] if problems else state_problem


def _read_small_files(folder: Path) -> tuple[Manifest | str, str | None]:
    """Return the manifest, or what is wrong with it; and what is wrong with the run's state."""
    manifest = Manifest.read(folder)
    return manifest, None if isinstance(manifest, str) else _state_problem(folder, list(manifest.files))


def _state_problem(folder: Path, sealed: list[str]) -> str | None:
    """Return what is wrong with the files that hold the state of the run, or None; they may be anything."""
    try:
        state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        if type(state.global_step) is not int or step_of(folder) not in (None, state.global_step):
            return f"{TRAINER_STATE_NAME} is of step {state.global_step!r}"
        if not isinstance(state.log_history, list):
            return f"{TRAINER_STATE_NAME} has no list of what was logged"
    except OSError:
        return f"it has no {TRAINER_STATE_NAME}"
    except (ValueError, TypeError, RecursionError) as error:
        return f"{TRAINER_STATE_NAME} cannot be read ({error})"
    try:
        latest = (folder / LATEST).read_text(encoding="utf-8").strip()
        if latest not in {path.name for path in folder.iterdir() if path.is_dir()}:
            return f"{LATEST} does not name a directory in it"
    except (OSError, ValueError):
        return f"it has no {LATEST} that can be read"
    needed = (TRAINER_STATE_NAME, LATEST, f"{latest}/{MODEL_STATES}", RNG_STATES)
    return next((f"it has no {pattern}" for pattern in needed if not fnmatch.filter(sealed, pattern)), None)


@contextmanager
def reading(checkpoint: Path | None) -> Iterator[None]:
    """Turn torch's refusal to load this checkpoint into a `LocalError`: another model's, or a pickle with code."""
    try:
        yield
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        first = next((line.strip() for line in str(error).splitlines()[1:] if line.strip()), "")
        raise LocalError(f"{checkpoint} is not a checkpoint of this run's model: {first}") from None
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise LocalError(
            f"a file of {checkpoint} asks for {named[1] if named else 'an object'} where tensors and numbers were "
            "expected; it was not loaded, since that could run any code. Resume from a checkpoint that you trust"
        ) from None


def facts_of(folder: Path) -> dict:
    """Return the facts of the run that wrote a whole checkpoint."""
    manifest = Manifest.read(folder)
    assert isinstance(manifest, Manifest), manifest
    return manifest.facts


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _share(files) -> list[str]:
    """Return this rank's share of the files to read."""
    return sorted(files)[rank() :: world_size()]


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    manifest.write(folder)
    _flush_directories(folder)


def flush(folder: Path) -> None:
    """Flush a directory and all that it holds to disk."""
    for name in _files(folder):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    _flush_directories(folder)


def _flush_directories(folder: Path) -> None:
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        _flush_directory(path)


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_aside(folder: Path) -> str:
    name = f"{DAMAGED}{folder.name}"
    names = chain([name], (f"{name}.{number}" for number in count(1)))
    kept = next(path for path in map(folder.with_name, names) if not path.exists())
    folder.rename(kept)
    return kept.name


def _of_writing(error: Exception) -> bool:
    """Return whether a file could not be written; torch raises RuntimeError for that, as for a lost peer."""
    writers = ("PytorchStreamWriter", "inline_container", "iostream", "unexpected pos")
    return isinstance(error, OSError | SafetensorError) or any(word in str(error) for word in writers)


def _not_written(run: Path, name: str, error: Exception) -> str:
    earlier = checkpoints(run)
    stands = (
        f"{earlier[0]} stands, and the same command resumes from it" if earlier else "there is no earlier checkpoint"
    )
    reason = f"{error_line(error)}; {shutil.disk_usage(run).free / GIB:.1f} GiB are free there"
    return f"{run / name} could not be written ({reason}): the run stops; {stands}"
