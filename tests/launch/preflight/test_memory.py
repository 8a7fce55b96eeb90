"""The estimate of `--sanity`: bytes a weight where nothing else counts, and what sharding takes off."""

from dataclasses import replace

import pytest

from launch.common.units import GIB
from launch.preflight.memory import Setup, estimate

PLAIN = Setup(
    parameters=10**9,
    trained=10**9,
    whole=0,
    whole_trained=0,
    hidden=1,
    layers=1,
    vocab=1,
    tokens=1,
    tensor_parallel=1,
    data_parallel=1,
    zero=1,
    offload=False,
    low_precision=True,
    fp32_gradients=False,
    checkpointing=False,
    head="fused",
    chunk_bytes=1,
    device=True,
)


@pytest.mark.parametrize(
    ("changes", "bytes_a_weight"),
    [
        ({}, 2 + 2 + 12 + 6),
        ({"zero": 0}, 2 + 2 + 12),
        ({"low_precision": False}, 4 + 4 + 8 + 4),
        ({"tensor_parallel": 4}, (2 + 2 + 12 + 6) / 4),
        ({"tensor_parallel": 4, "whole": 2 * 10**8}, 2 * 0.4 + (2 + 12 + 6) / 4),
        ({"tensor_parallel": 4, "trained": 10**8, "whole": 6 * 10**7, "whole_trained": 6 * 10**7}, 2 * 0.295 + 1.4),
        ({"data_parallel": 4}, 2 + 2 + (12 + 6) / 4),
        ({"data_parallel": 4, "zero": 2}, 2 + (2 + 12 + 6) / 4),
        ({"data_parallel": 4, "zero": 3}, (2 + 2 + 12) / 4),
        ({"data_parallel": 4, "zero": 2, "fp32_gradients": True}, 2 + (4 + 12 + 6) / 4),
        ({"data_parallel": 4, "zero": 1, "fp32_gradients": True}, 2 + 6 + (12 + 6) / 4),
        ({"zero": 3, "offload": True}, 2),
        ({"trained": 10**8}, 2 + (2 + 12 + 6) / 10),
        ({"trained": 10**8, "zero": 3, "data_parallel": 4}, (2 + (2 + 12) / 10) / 4),
    ],
)
def test_bytes_a_weight(changes, bytes_a_weight):
    assert estimate(replace(PLAIN, **changes))["total"] * GIB / 10**9 == pytest.approx(bytes_a_weight, rel=1e-3)


def test_what_the_head_holds():
    """The fp32 sum of its weight's gradient; chunks take the room of that gradient's rounding, where it has one."""
    sizes = replace(PLAIN, vocab=128_000, hidden=4096, chunk_bytes=None)
    for changes, weights in (({}, 4), ({"low_precision": False}, 2), ({"chunk_bytes": 128_000 * 4096 * 3}, 5)):
        assert estimate(replace(sizes, **changes))["head"] * GIB == weights * 128_000 * 4096
    assert estimate(replace(sizes, trained=1))["head"] * GIB == 2 * 128_000 * 4096, "a frozen weight has no gradient"


def test_an_update_takes_the_place_of_activations():
    parts = estimate(replace(PLAIN, tokens=10**8))
    assert parts["activations"] * GIB == 2 * 17e8 and parts["more in the update"] * GIB < 2.7e9
    assert estimate(replace(PLAIN, tokens=10**9))["more in the update"] == 0
