"""Reading of data sets from the Hugging Face hub: `name[@revision][:config][:split]`."""

import functools
import pkgutil
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import datasets
import datasets.packaged_modules
import pyarrow
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from launch.common.messages import error_line, typed_error_line
from launch.data.records import DataError, Note, Record, Records
from launch.data.sources.arrow_rows import dataset_rows

UNREADABLE = (ValueError, pyarrow.ArrowException)  # what a file of another shape leads to
DOWNLOAD = "hf download --repo-type dataset --local-dir DIRECTORY"
LOG_IN = "hf auth login, or HF_TOKEN in the environment"
PRIVATE = f"for a private one log in ({LOG_IN})"


class HubName(NamedTuple):
    """The parts of `name[@revision][:config][:split]`."""

    name: str
    revision: str | None
    config: str | None
    split: str

    @classmethod
    def of(cls, source: str) -> "HubName":
        whole, *rest = source.split(":")
        name, _, revision = whole.partition("@")
        return cls(name, revision or None, rest[0] if len(rest) > 1 else None, rest[-1] if rest else "train")


def without_revision(source: str) -> str:
    """Return the name under which rows of a data set are known, whatever its revision."""
    return re.sub("@[^:]*", "", source, count=1)


def hub_rows(source: str, streamed: bool = False) -> Records:
    """Yield the rows of a data set, which is mapped into memory, or `streamed` from the hub. Raises DataError."""
    name, read = HubName.of(source), 0
    with _explained(source):
        builder = _builder(source)
        rows = dataset_rows(_dataset(builder, name.split, streamed), without_revision(source))
    if name.revision != builder.hash:
        pinned = source.replace(source.split(":")[0], f"{name.name}@{builder.hash}", 1)
        yield Note(
            f"{without_revision(source)} has commit {builder.hash}; --data {pinned} reads that one at any time"
        )
    while True:
        with _explained(source, read):
            record = next(rows, None)
        if record is None:
            return
        read += isinstance(record, Record)
        yield record


def hub_fingerprint(source: str) -> str:
    """Return the commit of a data set, with its configuration and split. Raises DataError if it cannot be found."""
    with _explained(source):
        builder = _builder(source)
        return f"{builder.hash} {builder.config_id} {HubName.of(source).split}"


def hub_pinned(source: str) -> str:
    """Return the name of a data set with the commit that this process reads. Raises DataError."""
    with _explained(source):
        whole, *rest = source.split(":")
        return ":".join([f"{HubName.of(whole).name}@{_builder(source).hash}", *rest])


def _dataset(
    builder: datasets.DatasetBuilder, split: str, streamed: bool
) -> datasets.Dataset | datasets.IterableDataset:
    if streamed:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


def _builder(source: str) -> datasets.DatasetBuilder:
    """Return what reads a data set at one commit, the same one as often as it is asked for."""
    return builder_of(*HubName.of(source)[:3])


@functools.cache
def builder_of(name: str, revision: str | None, config: str | None) -> datasets.DatasetBuilder:
    builder = datasets.load_dataset_builder(name, config, revision=revision)
    if revision and isinstance(builder, Cache) and builder.hash != revision:
        # `datasets` takes the latest that it has downloaded where the hub does not answer
        raise ConnectionError(f"revision {revision} is not the one that was downloaded before, {builder.hash}")
    return builder


@contextmanager
def _explained(source: str, read: int | None = None) -> Iterator[None]:
    """Raise DataError for what the libraries raise: before a data set is open, or once so many rows are `read`."""
    try:
        yield
    except BaseException as error:  # the hub client raises many unrelated types, and panics of Rust are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, DatasetGenerationError) or (read is not None and isinstance(error, UNREADABLE)):
            advice = f"to drop the rows that cannot be read, give a local copy: {DOWNLOAD} {HubName.of(source).name}"
        else:
            advice = _advice(HubName.of(source), error)
        what = f"could not be read past row {read:,}" if read else "is no local file, and could not be loaded"
        raise DataError(f"{source!r} {what} from the hub ({_line(error)}); {advice}.") from error


def _line(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
    return typed_error_line(cause).partition(" Example of usage:")[0]


def _advice(name: HubName, error: BaseException) -> str:
    """Say what to do about an error of the libraries."""
    text = error_line(error, 1000)
    if isinstance(error, HFValidationError):
        return "check the path, or the name (owner/name)"
    if isinstance(error, DatasetNotFoundError):
        gated, revision = "gated" in text, " and the revision" if name.revision else ""
        return f"log in as one who has access ({LOG_IN})" if gated else f"check the name{revision}; {PRIVATE}"
    if isinstance(error, RuntimeError) and "scripts" in text:
        return (
            "no code of a data set is run: try the Parquet copy that the hub makes of many, "
            f"{name.name}@refs/convert/parquet, or convert it"
        )
    if isinstance(error, FileNotFoundError) and LocalEntryNotFoundError.__name__ not in text:
        return "give the name of a data set of JSONL, JSON, Parquet, CSV or text files"
    if isinstance(error, ValueError):
        return f"name a configuration or a split that it has ({name.name}:split, {name.name}:config:split)"
    return "check the network and start the same command again, or give a local copy"


def hub_name_problem(source: str) -> str | None:
    """Return why `source` cannot be the name of a data set on the hub; None if it can."""
    name, revision, _, _ = HubName.of(source)
    if name.lower() in {module.name for module in pkgutil.iter_modules(datasets.packaged_modules.__path__)}:
        # `datasets` would read whatever files of that kind are in the working directory
        return (
            f"{name!r} is a kind of file, not a data set: give a data file, a directory, or a hub name (owner/name)."
        )
    if (revision or ":" in source) and Path(name).exists():
        what = "split" if ":" in source else "revision"
        return (
            f"{source!r} names a {what} of a hub data set, but {name!r} is local: give the path of the {what} itself."
        )
    return None
