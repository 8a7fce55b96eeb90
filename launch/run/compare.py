"""Whether a start of a run is of the same run as what its directory holds: the recipe, and a checkpoint's facts."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from launch.common.errors import UserError
from launch.common.paths import MODEL, RECIPE, STARTED
from launch.config.options import SftOptions
from launch.data.sources.files import name_of
from launch.process.ranks import say
from launch.run import universal
from launch.run.checkpoints import facts_of

# Keys that may change from one start of a run to the next: what it shows and keeps, how far it goes, and how the same
# computation is laid out over ranks (`check_facts` compares that).
# fmt: off
FREE = {
    "logging_steps", "no_report", "eval_calibration", "report_to", "samples", "run_name", "disable_tqdm", "log_level",
    "eval_steps", "eval_strategy", "eval_on_start", "do_eval", "per_device_eval_batch_size",
    "save_steps", "save_strategy", "save_total_limit", "resume_from_checkpoint", "stall_timeout", "on_nonfinite",
    "max_steps", "num_train_epochs",
    "tp", "zero", "offload", "deepspeed", "head", "chunk_bytes", "gradient_checkpointing", "merge_adapter",
    "attn_implementation",
    "per_device_train_batch_size", "gradient_accumulation_steps",
    "dataloader_num_workers", "dataloader_prefetch_factor", "trust_remote_code",
}
# fmt: on


def check_recipe(path: Path, recipe: dict) -> None:
    """Raise `UserError` if the run in `path` has another recipe; print which free keys have changed."""
    before = _recipe_of(path)
    defaults = asdict(SftOptions())  # an earlier version may have had fewer flags
    keys = before.keys() | recipe.keys()
    values = {key: [_comparable(key, r.get(key, defaults.get(key))) for r in (before, recipe)] for key in keys}
    changed = {key: pair for key, pair in sorted(values.items()) if pair[0] != pair[1]}
    lines = {key: f"{key}: {then} before, {now} now" for key, (then, now) in changed.items()}
    if other := [line for key, line in lines.items() if key not in FREE]:
        raise UserError(
            f"--output_dir {path} holds a run of another recipe; use its own, or name another directory:\n  "
            + "\n  ".join(other)
        )
    for line in lines.values():
        say(f"changed since {path} was started: {line}")


def _comparable(key: str, value: Any) -> Any:
    """Sources without their revisions on the hub: `check_facts` compares the rows themselves."""
    if key not in ("data", "eval_data") or value is None:
        return value
    return name_of(value) if isinstance(value, str) else [name_of(source) for source in value]


def check_not_further(path: Path, recipe: dict, checkpoint: Path | None) -> None:
    """Raise `UserError` if the finished run in `path` is started again to train further than it did."""
    before, now = _length(_recipe_of(path)), _length(recipe)
    if now[0] == before[0] and now[1] <= before[1]:
        return
    resumes = (
        f"it resumes from {checkpoint}" if checkpoint else "it has no checkpoint, so it starts from the beginning"
    )
    raise UserError(
        f"{path} is finished with --{before[0]} {before[1]:g}, and its model is exported; to train to --{now[0]} "
        f"{now[1]:g}, move the model away (mv {path / MODEL} {path / MODEL}-before) and start the same command: "
        f"{resumes}"
    )


def _length(recipe: dict) -> tuple[str, float]:
    """Return the setting that says how far a run goes, and its value."""
    if (steps := recipe.get("max_steps", -1)) > 0:
        return "max_steps", steps
    return "num_train_epochs", recipe.get("num_train_epochs", 3.0)  # of transformers; a recipe leaves out defaults


def _recipe_of(path: Path) -> dict:
    """Return the recipe that a run was started with. Raises `UserError`."""
    try:
        recipe = yaml.safe_load((path / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path / RECIPE} cannot be read ({error}); name another --output_dir") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path / RECIPE} cannot be read (it holds no keys); name another --output_dir")
    return recipe


def check_facts(checkpoint: Path, before: dict, facts: dict) -> list[str]:
    """Compare the facts in a checkpoint's manifest with those of this start.

    Returns:
        What has changed of the layout over ranks, for which the checkpoint has to be converted.

    Raises:
        UserError: This run cannot resume from the checkpoint.
    """
    if before.get("adapter") != facts.get("adapter"):
        had, has = (f"{found.get('adapter', 'all weights')} trained" for found in (before, facts))
        raise UserError(
            f"{checkpoint} is of a run with {had}, and this one has {has}; give the flags of that run, or start "
            "with a new --output_dir"
        )
    if missing := facts.keys() - before.keys():
        raise UserError(
            f"{checkpoint} does not name its {', '.join(sorted(missing))}: it was written by another version of this "
            "project; resume with that version, or name another --output_dir"
        )
    if before["data"] != facts["data"]:
        raise UserError(
            f"the training data differs from the data of {checkpoint} (--data, the tokenizer, a flag such as "
            f"--max_length or --chat_template, or the day in {checkpoint.parent / STARTED} has changed); restore it, "
            "or start with a new --output_dir"
        )
    if before["rows_a_step"] != facts["rows_a_step"]:
        raise UserError(
            f"{checkpoint} was written with {before['rows_a_step']} rows a step, and this run would take "
            f"{facts['rows_a_step']}; change --per_device_train_batch_size or --gradient_accumulation_steps so that "
            "rows x accumulation x data-parallel ranks stay the same"
        )
    return universal.changes(before, facts)


def same_base(checkpoint: Path | None, base: str) -> str:
    """Return the digest of the model that adapters are trained beside, for the facts of the next checkpoints.

    Raises `UserError` if the checkpoint's adapters were trained beside another.
    """
    before = None if checkpoint is None else facts_of(checkpoint).get("base")
    if checkpoint is not None and before is None:
        raise UserError(
            f"{checkpoint} does not name its base: it was written by another version of this project; resume with "
            "that version, or name another --output_dir"
        )
    if before not in (None, base):
        raise UserError(
            f"the weights or the configuration of --model differ from those that the adapter of {checkpoint} was "
            "trained beside, and no checkpoint holds them; restore them, or start with a new --output_dir"
        )
    return base
