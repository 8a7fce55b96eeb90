"""The order of rows: each once an epoch, in the same step on any number of ranks, blank rows last."""

import random
from itertools import chain
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from launch.data.sampler import EpochSampler, grouped_by_length, in_order, shuffled
from launch.data.splits import training_split

STRATEGIES = ("random", "sequential", "group_by_length")


def split(count, strategy, batch, accumulate, ranks, drop_last=False, seed=3):
    """The rows of a run, row n of n + 2 tokens, and their sampler."""
    ids = [[5] * (2 + n % 7) for n in range(count)]
    columns = {"input_ids": ids, "labels": ids, "length": list(map(len, ids))}
    rows = datasets.Dataset.from_dict(columns | {"where": [f"a:{n}" for n in range(count)]})
    args = SimpleNamespace(
        train_sampling_strategy=strategy,
        dataloader_drop_last=drop_last,
        per_device_train_batch_size=batch,
        seed=seed,
        data_seed=None,
    )
    return training_split(rows, args, batch * accumulate * ranks, batch * ranks, 2, None)


def steps(sampler, batch, accumulate, ranks, drop_last=False, skip=0) -> list[list[int]]:
    """The rows of each step of an epoch, as accelerate gives them to the ranks."""
    whole = BatchSampler(sampler, batch, drop_last)
    shards = [list(BatchSamplerShard(whole, ranks, rank)) for rank in range(ranks)]
    assert len({len(shard) for shard in shards}) == 1
    micro = [[row for shard in shards for row in shard[n]] for n in range(len(shards[0]))][skip:]
    return [flat(micro[start : start + accumulate]) for start in range(0, len(micro), accumulate)]


def flat(lists: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


LAYOUTS = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))  # rows, accumulation, ranks


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.sampled_from(STRATEGIES), LAYOUTS, st.integers(0, 5))
def test_each_row_once_and_in_the_step_of_one_process(count, strategy, layout, epoch):
    batch, accumulate, ranks = layout
    filled, sampler = split(count, strategy, *layout)
    sampler.set_epoch(epoch)
    taken = steps(sampler, *layout)
    assert sum(map(len, taken)) == len(sampler) == len(filled) < count + batch * ranks
    real = [sorted(row for row in step if row < count) for step in taken]
    assert sorted(flat(real)) == list(range(count))
    assert all(filled[row]["where"] == "blank" for step in taken for row in step if row >= count)

    alone = batch * accumulate * ranks, 1, 1
    _, sampler = split(count, strategy, *alone)
    sampler.set_epoch(epoch)
    assert real == [sorted(row for row in step if row < count) for step in steps(sampler, *alone)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.sampled_from(STRATEGIES), LAYOUTS)
def test_dropping_the_last_rows_leaves_whole_steps_of_real_rows(count, strategy, layout):
    batch, accumulate, ranks = layout
    rows, sampler = split(count, strategy, *layout, drop_last=True)
    taken = steps(sampler, *layout, drop_last=True)
    size = batch * accumulate * ranks
    assert len(rows) == count and [len(step) for step in taken] == [size] * (count // size)
    assert len(set(flat(taken))) == count // size * size


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.sampled_from(STRATEGIES), st.integers(1, 4), st.integers(0, 3), st.data())
def test_an_epoch_that_is_resumed_yields_the_rest(count, strategy, batch, epoch, data):
    """As Trainer resumes: another process, whose generator is elsewhere, skips the batches that were trained on."""
    filled, sampler = split(count, strategy, batch, 1, 1)
    sampler.set_epoch(epoch)
    whole = list(BatchSampler(sampler, batch, drop_last=False))
    torch.manual_seed(random.getrandbits(32))
    _, again = split(count, strategy, batch, 1, 1)
    again.set_epoch(epoch)
    skipped = data.draw(st.integers(0, len(whole) - 1))
    loader = skip_first_batches(DataLoader(filled, batch, sampler=again, collate_fn=lambda rows: rows), skipped)
    assert [[row["where"] for row in rows] for rows in loader] == [
        [filled[row]["where"] for row in rows] for rows in whole[skipped:]
    ]


@pytest.mark.parametrize("order", [shuffled(200), grouped_by_length(list(range(200)), 8)])
def test_a_function_of_seed_and_epoch(order):
    def rows(seed, epoch):
        torch.manual_seed(random.getrandbits(32))  # the process's generator stands anywhere
        sampler = EpochSampler(order, 200, range(0), seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert rows(3, 2) == rows(3, 2)
    different = [rows(seed, epoch) for seed, epoch in ((0, 0), (0, 1), (7, 0))]
    assert different[0] != different[1] != different[2] != different[0]


def test_the_order_of_the_data():
    assert list(EpochSampler(in_order(5), 5, range(5, 7), 0)) == [0, 1, 2, 3, 4, 5, 6]


def grouped(lengths: list[int]) -> list[int]:
    return list(EpochSampler(grouped_by_length(lengths, 8), len(lengths), range(0), 0))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100, 1003])
def test_the_longest_row_comes_first(count):
    lengths = [random.randint(1, 300) for _ in range(count)]
    taken = grouped(lengths)
    assert sorted(taken) == list(range(count)) and lengths[taken[0]] == max(lengths)


def test_steps_are_alike_within_and_in_no_order_of_length():
    draw = random.Random(0)
    lengths = [draw.randint(1, 1000) for _ in range(8 * 200)]
    taken = grouped(lengths)
    steps = [[lengths[row] for row in taken[start : start + 8]] for start in range(8, len(taken), 8)]
    assert sum(max(step) - min(step) for step in steps) / len(steps) < 100
    means = torch.tensor([sum(step) / 8 for step in steps])
    assert abs(torch.corrcoef(torch.stack([means[1:], means[:-1]]))[0, 1]) < 0.3
