"""Rows without label tokens, which make a split divide evenly over ranks without counting a row twice."""

import datasets

from launch.data.examples.rows import IGNORED

BLANK = "blank"  # the `where` of such a row


def fill_to_multiple(rows: datasets.Dataset, multiple: int, token_id: int) -> datasets.Dataset:
    """Append blank rows up to the next multiple; a sampler would repeat real rows instead."""
    missing = -len(rows) % multiple
    if missing == 0:
        return rows
    # two tokens: a causal LM has its first label at the second token
    blank = {"input_ids": [token_id, token_id], "labels": [IGNORED, IGNORED], "length": 2, "where": BLANK}
    blank = {name: blank[name] for name in rows.features}
    return datasets.concatenate_datasets(
        [rows, datasets.Dataset.from_list([blank] * missing, features=rows.features)]
    )
