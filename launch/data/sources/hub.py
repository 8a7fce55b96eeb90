"""Reading of data sets from the Hugging Face hub."""

import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import datasets.packaged_modules

from launch.common.messages import typed_error_line
from launch.data.records import DataError, Records
from launch.data.sources.arrow_rows import dataset_rows


def hub_rows(source: str, streamed: bool = False) -> Records:
    """Yield the rows of `name`, `name:split` or `name:config:split`. Raises DataError if it cannot be loaded."""
    yield from dataset_rows(load_hub(source, streamed), source)


def hub_fingerprint(source: str, streamed: bool = False) -> str:
    """Return a hash of a data set's files; if `streamed`, of their names and revision. Raises DataError."""
    if streamed:
        return _loaded(source, lambda name, config, split: f"{_builder_hash(name, config)} {split}")
    return load_hub(source)._fingerprint


def load_hub(source: str, streamed: bool = False) -> datasets.Dataset | datasets.IterableDataset:
    """Load `name`, `name:split` or `name:config:split`. Raises DataError if that fails.

    It is mapped into memory, or `streamed` from the hub.
    """
    more = {"streaming": True} if streamed else {}
    return _loaded(source, lambda name, config, split: datasets.load_dataset(name, config, split=split, **more))


def _builder_hash(name: str, config: str | None) -> str:
    builder = datasets.load_dataset_builder(name, config)
    return f"{builder.hash} {builder.config_id}"  # the latter holds a hash of the files' names and revisions


def _loaded(source: str, load: Callable[[str, str | None, str], Any]) -> Any:
    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) > 1 else None
    try:
        return load(name, config, split)
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
