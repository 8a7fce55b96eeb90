"""Reading of data sets from the Hugging Face hub."""

import datasets

from launch.data.records import DataError, Record


def read_hub(source: str) -> list[Record]:
    """Read the records of `name`, `name:split` or `name:config:split`. Raises DataError if that fails."""
    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) > 1 else None
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub client raises many unrelated types
        raise DataError(
            f"{source!r} is not a local file and could not be loaded from the hub as data set {name!r}, split "
            f"{split!r} ({type(error).__name__}: {error}); check the name (name:split or name:config:split) "
            "and the network, or give a local file."
        ) from error
    records = [Record(dict(row), f"{source}:{number}") for number, row in enumerate(rows, start=1)]
    if not records:
        raise DataError(f"{source!r} was expected to hold records, but it holds none.")
    return records
