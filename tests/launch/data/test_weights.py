"""--data_weights: each source its share of an epoch, and each of its rows as often as the others."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.data.sampler import in_order, shuffled
from launch.data.weights import describe_epoch, rows_of_sources, weighted

SOURCES = st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0.01, 0.3, 1.0, 7.0])), min_size=1, max_size=4)


def ranges(sizes) -> list[range]:
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def epochs(sources, weights, number, seed=3, arrange=lambda rows: shuffled(len(rows))) -> list[list[int]]:
    order = weighted(sources, weights, seed, arrange)
    return [order(torch.Generator().manual_seed(seed + epoch)) for epoch in range(number)]


@settings(max_examples=60, deadline=None)
@given(SOURCES)
def test_shares_are_met_and_no_row_comes_more_often_than_another(drawn):
    sizes, weights = zip(*drawn, strict=True)
    sources = ranges(sizes)
    total = sum(sizes)
    taken = epochs(sources, weights, 5)
    for epoch in taken:
        assert len(epoch) == total
    times = Counter(row for epoch in taken for row in epoch)
    for source, weight in zip(sources, weights, strict=True):
        share = total * weight / sum(weights)
        assert all(abs(sum(row in source for row in epoch) - share) < 1 for epoch in taken)
        counts = {times[row] for row in source}
        assert max(counts) - min(counts) <= 1


def test_epochs_differ_and_repeat_by_seed():
    sources = ranges([30, 10])
    first = epochs(sources, [1, 1], 3)
    assert first == epochs(sources, [1, 1], 3) != epochs(sources, [1, 1], 3, seed=4)
    assert first[0] != first[1] and set(first[0]) != set(first[1])


def test_only_the_ratio_of_weights_matters():
    for weights in ([1e308, 1e308], [5e-324, 5e-324], [1, 1]):
        assert rows_of_sources(weights, 10) == [5, 5]


def test_rows_are_arranged_as_told():
    (epoch,) = epochs(ranges([4, 4]), [3, 1], 1, arrange=lambda rows: in_order(len(rows)))
    assert [row < 4 for row in epoch] == [True] * 6 + [False] * 2


@pytest.mark.parametrize(
    ("weights", "count", "rows"),
    [([0.7, 0.3], 10, [7, 3]), ([1, 1, 1], 10, [4, 3, 3]), ([1, 1000], 5, [0, 5]), ([2.0], 3, [3])],
)
def test_numbers_of_rows_add_up(weights, count, rows):
    assert rows_of_sources(weights, count) == rows


def test_an_epoch_is_described():
    assert describe_epoch(["a", "b"], ranges([20, 10]), [0.2, 0.8]) == [
        "an epoch is 30 rows, by --data_weights:",
        "  6 of a, which has 20: each row 0.3 times",
        "  24 of b, which has 10: each row 2.4 times",
    ]
