"""Ranks that have read other rows are told so, all of them, before anything is trained."""

import torch.distributed as dist

from launch.layout import same_everywhere
from tests.ranks import pool


def digest_of(digests: list[str]) -> str:
    return same_everywhere(lambda: digests[dist.get_rank()])


def test_the_same_rows():
    assert pool(3).run(digest_of, ["abc"] * 3, time_limit=120) == ["abc"] * 3


def test_other_rows_on_one_rank():
    outcomes = pool(3).attempt(digest_of, ["abc", "abc", "xyz"], time_limit=120)
    assert [outcome.error for outcome in outcomes] == ["UserError"] * 3
    assert all("rank(s) [2] have read others than rank 0" in outcome.message for outcome in outcomes)
