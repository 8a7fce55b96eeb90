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
    """What of the layout differs so that a checkpoint must be converted; without ZeRO, data parallelism does not.

    Raises `UserError` for anything but ZeRO 1 and 2. Without ZeRO there is no state that DeepSpeed could convert, and
    what 0.19.8 makes of ZeRO 3 (from two data-parallel ranks to one) does not go on where it was: the loss is 1e-4
    off after two steps and 4e-3 after five.
    """
    if before["zero"] == now["zero"] == 0 and before["tp"] == now["tp"]:
        return []
    found = [f"{words} {before[key]} -> {now[key]}" for key, words in LAYOUT.items() if before[key] != now[key]]
    if found and not {before["zero"], now["zero"]} <= {1, 2}:
        raise UserError(
            f"a checkpoint of ZeRO {before['zero']} cannot go on as was asked ({', '.join(found)}): only those of "
            "ZeRO 1 and 2 go on under another layout; start it as it was"
        )
    return found


def convert(checkpoint: Path, run: Path) -> Path:
    """A directory in `run` from which any layout can go on; for rank 0. It holds the optimizer's state in fp32.

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
        num_extract_workers=1,  # in this process: others would read pickles unguarded
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            ds_to_universal.main(args)
    except Exception as fault:
        raise UserError(
            f"{checkpoint} cannot be converted to another layout over ranks: {error_line(fault)}"
        ) from fault
    (folder / "latest_universal").write_text(target.name)
    return folder
