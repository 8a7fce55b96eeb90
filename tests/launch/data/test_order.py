"""Rows by length: every row once, alike within a step, in another order each epoch, and the same on every rank."""

import random

import pytest
import torch

from launch.data.sampler import GroupedByLength


def order(lengths: list[int], rows: int, seed: int = 0, epoch: int = 0) -> list[int]:
    torch.manual_seed(random.getrandbits(32))  # the process's generator stands anywhere
    sampler = GroupedByLength(rows, lengths, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100, 1003])
def test_every_row_once(count):
    lengths = [random.randint(1, 300) for _ in range(count)]
    taken = order(lengths, 8)
    assert sorted(taken) == list(range(count)) and lengths[taken[0]] == max(lengths)


def test_a_function_of_seed_and_epoch():
    lengths = list(range(200))
    assert order(lengths, 8, seed=3, epoch=2) == order(lengths, 8, seed=3, epoch=2)
    different = [order(lengths, 8, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (7, 0))]
    assert different[0] != different[1] != different[2] != different[0]


def test_steps_are_alike_within_and_in_no_order_of_length():
    draw = random.Random(0)
    lengths = [draw.randint(1, 1000) for _ in range(8 * 200)]
    taken = order(lengths, 8)
    steps = [[lengths[row] for row in taken[start : start + 8]] for start in range(8, len(taken), 8)]
    assert sum(max(step) - min(step) for step in steps) / len(steps) < 100
    means = torch.tensor([sum(step) / 8 for step in steps])
    assert abs(torch.corrcoef(torch.stack([means[1:], means[:-1]]))[0, 1]) < 0.3
