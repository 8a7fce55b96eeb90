"""Rows without label tokens, which make a held-out split divide evenly over ranks without counting a row twice."""

import datasets

from launch.data.examples.rows import IGNORED


def fill_to_multiple(rows: datasets.Dataset, multiple: int, token_id: int) -> datasets.Dataset:
    """`rows` with blank ones behind them up to the next multiple; a sampler would repeat real rows instead."""
    missing = -len(rows) % multiple
    if missing == 0:
        return rows
    # two tokens: the labels of a causal LM begin at its second
    blank = {"input_ids": [token_id, token_id], "labels": [IGNORED, IGNORED], "where": "blank"}
    return datasets.concatenate_datasets(
        [rows, datasets.Dataset.from_list([blank] * missing, features=rows.features)]
    )
