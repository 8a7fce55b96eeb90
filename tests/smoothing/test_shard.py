"""Who holds which columns: integers."""

import dataclasses

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from smoothing import VocabShard


@pytest.mark.parametrize(
    "vocab_size, ranks, expected",
    [
        (10, 1, [(0, 10)]),
        (10, 2, [(0, 5), (5, 10)]),
        (10, 3, [(0, 4), (4, 7), (7, 10)]),
        (11, 4, [(0, 3), (3, 6), (6, 9), (9, 11)]),
        (2, 4, [(0, 1), (1, 2), (2, 2), (2, 2)]),
        (128_256, 2, [(0, 64_128), (64_128, 128_256)]),
        (50_257, 4, [(0, 12_565), (12_565, 25_129), (25_129, 37_693), (37_693, 50_257)]),
    ],
)
def test_bounds(vocab_size, ranks, expected):
    assert VocabShard.bounds(vocab_size, ranks) == expected


@given(st.integers(1, 300_000), st.integers(1, 64))
def test_bounds_tile_the_vocabulary_as_deepspeed_does(vocab_size, ranks):
    bounds = VocabShard.bounds(vocab_size, ranks)
    assert [start for start, _ in bounds] + [vocab_size] == [0] + [stop for _, stop in bounds]
    # deepspeed.module_inject.tp_shard.get_shard_size without key-value heads
    sizes = [vocab_size // ranks + (1 if rank < vocab_size % ranks else 0) for rank in range(ranks)]
    assert [stop - start for start, stop in bounds] == sizes


def split(vocab_size):
    shard = VocabShard.split(vocab_size, dist.group.WORLD)
    return (
        (shard.start, shard.stop),
        shard.vocab_size,
        (shard.rank, shard.world_size),
        (shard.size, shard.real_size),
    )


@pytest.mark.parametrize("vocab_size", [23, 2])
def test_split_over_a_group(ranks, vocab_size):
    bounds = VocabShard.bounds(vocab_size, ranks.size)
    for rank, (held, of, place, sizes) in enumerate(ranks.run(split, vocab_size)):
        assert (held, of, place) == (bounds[rank], vocab_size, (rank, ranks.size))
        assert sizes == (held[1] - held[0],) * 2


@pytest.mark.parametrize(
    "start, stop, vocab_size, size, real_size",
    [(0, 5, 12, 5, 5), (8, 16, 12, 8, 4), (12, 16, 12, 4, 0), (14, 16, 12, 2, 0), (3, 3, 12, 0, 0)],
)
def test_padding_is_not_real(start, stop, vocab_size, size, real_size):
    group = object()  # only its being there matters
    shard = VocabShard(start, stop, vocab_size, group)
    assert (shard.size, shard.real_size) == (size, real_size)


def test_whole():
    shard = VocabShard.whole(7)
    assert (shard.start, shard.stop, shard.vocab_size, shard.group) == (0, 7, 7, None)
    assert (shard.rank, shard.world_size, shard.size, shard.real_size) == (0, 1, 7, 7)


def test_alone_with_padding():
    shard = VocabShard(0, 8, 7)
    assert (shard.size, shard.real_size) == (8, 7)


@pytest.mark.parametrize(
    "start, stop, vocab_size",
    [(0, 6, 7), (1, 7, 7), (3, 2, 7), (-1, 7, 7), (0, 0, 0), (0, 7.0, 7), (0, -1, -1)],
)
def test_alone_it_must_hold_the_whole_vocabulary(start, stop, vocab_size):
    with pytest.raises(ValueError, match=str(stop)):
        VocabShard(start, stop, vocab_size)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VocabShard.whole(7).start = 1
