"""A checkpoint of one layout over ranks, made ready for another, through DeepSpeed's universal checkpoints."""

import contextlib
import io
import shutil
from argparse import Namespace
from pathlib import Path

from deepspeed.checkpoint import ds_to_universal

from launch.common.errors import UserError
from launch.common.messages import error_line
from launch.common.paths import UNIVERSAL_PARTIAL, WEIGHTS

LAYOUT = {"tp": "tensor parallelism", "data_parallel": "data-parallel ranks", "zero": "ZeRO stage"}


def changes(before: dict, now: dict) -> list[str]:
    """Return what of the layout differs, so that a checkpoint must be converted; not by dp alone without ZeRO.

    Raises `UserError` for adapters, and for anything but ZeRO 1 and 2. Without ZeRO there is no state that DeepSpeed
    could convert.
    What DeepSpeed 0.19.8 converts from ZeRO 3 (two data-parallel ranks to one) resumes with another state: the loss
    is 1e-4 off after two steps and 4e-3 after five.
    """
    if before["zero"] == now["zero"] == 0 and before["tp"] == now["tp"]:
        return []
    found = [f"{words} {before[key]} -> {now[key]}" for key, words in LAYOUT.items() if before[key] != now[key]]
    if found and now.get("adapter"):
        raise UserError(
            f"a checkpoint of an adapter cannot be resumed under another layout ({', '.join(found)}): its frozen "
            "weights are not in it; keep the layout"
        )
    if found and not {before["zero"], now["zero"]} <= {1, 2}:
        raise UserError(
            f"a checkpoint of ZeRO {before['zero']} cannot be resumed under another layout ({', '.join(found)}); "
            "only checkpoints of ZeRO 1 and 2 can, under ZeRO 1 or 2; keep the layout"
        )
    return found


def convert(checkpoint: Path, run: Path) -> Path:
    """Make a directory in `run` that any layout can resume from, with the optimizer's state in fp32. For rank 0.

    Raises `UserError` if DeepSpeed cannot convert it: a layer whose shards it cannot put together.
    """
    folder = run / UNIVERSAL_PARTIAL
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.is_file() and not path.match(WEIGHTS):
            shutil.copy(path, folder)
    source = next(checkpoint.glob("global_step*"))
    target = folder / f"{source.name}_universal"
    args = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # in this process: others would load pickles unguarded
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            ds_to_universal.main(args)
    except Exception as error:
        raise UserError(
            f"{checkpoint} cannot be converted to another layout over ranks: {error_line(error)}"
        ) from error
    (folder / "latest_universal").write_text(target.name)
    return folder
