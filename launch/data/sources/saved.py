"""Directories written by `Dataset.save_to_disk`. `DatasetDict.save_to_disk` writes a directory of those."""

import json
from pathlib import Path

import datasets

from launch.common.messages import error_line, typed_error_line
from launch.data.records import DataError, Record, Records, Rejected
from launch.data.sources.arrow_rows import BROKEN, dataset_rows

STATE = "state.json"
INFO = "dataset_info.json"


def is_saved(folder: Path) -> bool:
    """Whether `folder` was written by `Dataset.save_to_disk`."""
    return (folder / INFO).is_file() and bool(saved_files(folder))


def saved_rows(folder: Path) -> Records:
    """Yield the rows of a saved data set. Raises DataError if it cannot be loaded."""
    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever a file that is missing or damaged leads to
        raise DataError(
            f"{folder} was expected to be a data set that save_to_disk wrote, but cannot be loaded "
            f"({typed_error_line(error)}); save it again."
        ) from error
    read = 0
    try:
        for row in dataset_rows(dataset, str(folder)):
            read += isinstance(row, Record)
            yield row
    except BROKEN as error:
        yield Rejected(f"{folder}:{read + 1}", "damaged Arrow, the rest is lost", error_line(error, 80))


def saved_files(folder: Path) -> list[Path]:
    """Return the files that hold the rows of a saved data set, none if it is not one."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
