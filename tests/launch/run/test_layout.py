"""What a checkpoint is told of its run; ranks that have read other rows learn of it before anything is trained."""

from types import SimpleNamespace

import torch.distributed as dist

from launch.config.options import SftOptions
from launch.run.layout import layout, same_everywhere
from tests.support.ranks import pool


def digest_of(digests: list[str]) -> str:
    return same_everywhere(lambda: digests[dist.get_rank()])


def test_the_same_rows():
    assert pool(3).run(digest_of, ["abc"] * 3, time_limit=120) == ["abc"] * 3


def test_other_rows_on_one_rank():
    outcomes = pool(3).attempt(digest_of, ["abc", "abc", "xyz"], time_limit=120)
    assert [outcome.error for outcome in outcomes] == ["UserError"] * 3
    assert all("rank 2 read other rows than rank 0" in outcome.message for outcome in outcomes)


def test_what_a_checkpoint_knows():
    config = SimpleNamespace(config={"zero_optimization": {"stage": 2}})
    args = SimpleNamespace(
        world_size=8, per_device_train_batch_size=3, gradient_accumulation_steps=5, hf_deepspeed_config=config
    )
    facts = layout(SftOptions(model="base", tp=2), args, SimpleNamespace(digest="abc"))
    assert facts == {"tp": 2, "data_parallel": 4, "zero": 2, "rows_a_step": 60, "data": "abc"}
    options = SftOptions(model="base", tp=2, lora_rank=4, dora=True)
    adapted = layout(options, args, SimpleNamespace(digest="abc"))
    assert adapted == facts | {"adapter": "DoRA of rank 4 in all-linear of base"}
