"""Selection of a directory's data files. Every file left out is counted or reported."""

import os
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

from launch.common.messages import one_line, shortened
from launch.data.records import DataError, Note, Rejected
from launch.data.sources.saved import is_saved

DESCRIPTIONS = (
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
)  # written by `datasets` beside its data
TRAIN = "train"
HELD_OUT = "held out"
MORE = "(s|set|data|split)?"
PARTS = {  # a name that matches both is held out
    HELD_OUT: re.compile(f"(test|val|valid|validation|dev|eval|evaluation|held.?out|hold.?out){MORE}"),
    TRAIN: re.compile(f"train(ing)?{MORE}"),
}
Entries = dict[Path, str]  # each path with the reason why it is not read, "" if it is read


def files_of(
    folder: Path, is_data: Callable[[Path], bool], held_out: bool
) -> tuple[list[Path], list[Rejected | Note]]:
    """List the data files and saved data sets under `folder` in sorted order, and what to report of other files.

    Hidden files, and those that obviously describe the data, are skipped. Where some files are named train and others
    test, only one kind is read: train, or test with `held_out`; a note names the files left out.

    Raises DataError if there is nothing to read.
    """
    entries = _entries(folder, is_data)
    left_out = _left_out(entries, folder, held_out)
    unread = {path: why for path, why in entries.items() if why and path not in left_out}
    files = [path for path, why in entries.items() if not why and path not in left_out]
    if not files:
        found = {"not read": unread, "left out": left_out}
        more = "; ".join(f"{what}: {_names(paths)}" for what, paths in found.items() if paths)
        raise DataError(
            f"{folder} was expected to hold data files (JSONL, JSON, Parquet, CSV, TSV), but it holds none"
            + (f" ({more})." if more else ".")
        )
    others: list[Rejected | Note] = [Note(_left_out_note(folder, left_out, held_out))] if left_out else []
    others += [Rejected(f"{path}:1", "unread file", why, whole_file=True) for path, why in unread.items()]
    return files, others


def _entries(folder: Path, is_data: Callable[[Path], bool]) -> Entries:
    """List the files under `folder` in sorted order."""
    found = {}

    def unlisted(error: OSError) -> None:
        found[Path(error.filename)] = f"cannot be listed: {error.strerror}"

    for parent, folders, names in os.walk(folder, onerror=unlisted):
        if is_saved(Path(parent)):
            found[Path(parent)] = ""
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink():
                found[path] = "a symlink to a directory"
        for path in (Path(parent, name) for name in names):
            if not path.name.startswith(".") and not _about_data(path, is_data):
                found[path] = _why_unread(path, is_data)
    return dict(sorted(found.items()))


def _about_data(path: Path, is_data: Callable[[Path], bool]) -> bool:
    name = path.name.lower()
    words = name.startswith(("readme", "license")) or name.endswith(".md")
    return name in DESCRIPTIONS or (words and not is_data(path))


def _why_unread(path: Path, is_data: Callable[[Path], bool]) -> str:
    if not os.path.isfile(path):
        return "not a regular file"
    return "" if is_data(path) else "not a supported file type"


def _left_out(entries: Entries, folder: Path, held_out: bool) -> Entries:
    """Select the files that do not belong to the wanted part, where files of both parts are present."""
    parts = {path: _part(path.relative_to(folder)) for path in entries}
    # A train file of an unsupported type counts too: the files beside it are still not for training.
    if TRAIN not in parts.values() or all(why for path, why in entries.items() if parts[path] == HELD_OUT):
        return {}
    wanted = HELD_OUT if held_out else TRAIN
    return {path: why for path, why in entries.items() if parts[path] != wanted}


def _part(path: Path) -> str | None:
    """Return the part that a word in the file's name stands for, or else in its innermost directory that has one."""
    for name in map(str.lower, reversed(path.parts)):
        words = re.findall("[a-z]+", name)
        words += [f"{first}-{second}" for first, second in pairwise(words)]  # held_out
        for part, known in PARTS.items():
            if any(map(known.fullmatch, words)):
                return part
    return None


def _left_out_note(folder: Path, left_out: Entries, held_out: bool) -> str:
    place, names = one_line(str(folder)), _names(left_out)
    if held_out:
        return f"{place} has files to evaluate on by their names, so others are left out: {names}"
    return f"{place} has files named train, so others are left out: {names}; to evaluate on them, give --eval_data"


def _names(paths: Iterable[Path]) -> str:
    return shortened(", ".join(path.name for path in paths))
