"""Reading of data sets from the Hugging Face hub."""

import datasets

from launch.data.records import DataError, Record, Records
from launch.data.sources.arrow_rows import arrow_rows

BATCH = 1000  # rows


def hub_rows(source: str) -> Records:
    """Yield the rows of `name`, `name:split` or `name:config:split`. Raises DataError if it cannot be loaded."""
    number = 0
    for table in load_hub(source).with_format("arrow").iter(BATCH):
        for batch in table.to_batches():
            for fields in arrow_rows(batch):
                number += 1
                yield Record(fields, f"{source}:{number}")


def load_hub(source: str) -> datasets.Dataset:
    """Load `name`, `name:split` or `name:config:split`, memory-mapped. Raises DataError if that fails."""
    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) > 1 else None
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub client raises many unrelated types
        raise DataError(
            f"{source!r} is not a local file and could not be loaded from the hub as data set {name!r}, split "
            f"{split!r} ({type(error).__name__}: {error}); check the name (name:split or name:config:split) "
            "and the network, or give a local file."
        ) from error
