"""Reading of data sets from the Hugging Face hub."""

import pkgutil
from pathlib import Path

import datasets
import datasets.packaged_modules

from launch.common.messages import typed_error_line
from launch.data.records import DataError, Records
from launch.data.sources.arrow_rows import dataset_rows


def hub_rows(source: str) -> Records:
    """Yield the rows of `name`, `name:split` or `name:config:split`. Raises DataError if it cannot be loaded."""
    yield from dataset_rows(load_hub(source), source)


def load_hub(source: str) -> datasets.Dataset:
    """Load `name`, `name:split` or `name:config:split`, mapped into memory. Raises DataError if that fails."""
    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) > 1 else None
    try:
        return datasets.load_dataset(name, config, split=split)
    except BaseException as error:  # the hub client raises many unrelated types, and panics of Rust are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"{source!r} is not a local file and could not be loaded from the hub as data set {name!r}, split "
            f"{split!r} ({typed_error_line(error)}); check the name (name:split or name:config:split) "
            "and the network, or give a local file."
        ) from error


def hub_name_problem(source: str) -> str | None:
    """Return why `source` cannot be the name of a data set on the hub; None if it can."""
    name, *rest = source.split(":")
    if name.lower() in {module.name for module in pkgutil.iter_modules(datasets.packaged_modules.__path__)}:
        # `datasets` would read whatever files of that kind are in the working directory
        return (
            f"{name!r} is a kind of file, not a data set: give a data file, a directory, or a hub name (owner/name)."
        )
    if rest and Path(name).exists():
        return (
            f"{source!r} names a split of a hub data set, but {name!r} is local: give the path of the split itself."
        )
    return None
