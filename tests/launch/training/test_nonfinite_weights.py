"""Under ZeRO 3 a rank's part of a weight may end in padding, which no computation wrote."""

import pytest
import torch
import torch.distributed as dist

from launch.training.nonfinite import not_finite


def partitioned(values: list[float], numel: int) -> torch.nn.Parameter:
    """A weight of so many numbers as ZeRO 3 leaves it, with one rank's part."""
    weight = torch.nn.Parameter(torch.empty(0))
    weight.ds_tensor, weight.ds_numel, weight.ds_process_group = torch.tensor(values), numel, None
    return weight


@pytest.mark.parametrize(
    ("rank", "values", "bad"),
    [
        (1, [1.0, 2.0, 3.0, torch.nan], set()),  # the eighth of seven numbers
        (1, [1.0, 2.0, torch.inf, 0.0], {"weight"}),
        (0, [1.0, 2.0, 3.0, torch.nan], {"weight"}),
        (2, [torch.nan] * 4, set()),  # all padding
    ],
)
def test_padding_does_not_count(monkeypatch, rank, values, bad):
    monkeypatch.setattr(dist, "get_rank", lambda group: rank)
    assert not_finite([("weight", partitioned(values, numel=7))]) == bad
