"""How often the kernels touch each element: one read for the statistics, one read and one write for gradients.

Rows without a label are not read, padding columns neither, and everything is written. That every launch of every case
stays inside its tensors and races with nothing is checked in `test_kernels.py`, which runs all of them `watched`.
"""

import importlib.util

import pytest
import torch
from kernel_memory import watched
from ranks import Ranks

from smoothing import VocabShard, products
from smoothing.call import LossCall
from smoothing.options import LossOptions

# not imported here: Triton reads TRITON_INTERPRET when it is imported, and the ranks import this file
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

PADDING = 6
IGNORED = [1, 4]
LABEL_ROWS = torch.tensor([0, 2, 3, 5])
KINDS = {"uniform": {}, "prior": {"prior": True}, "capped": {"logit_softcap": 30.0}}
SIZES = [1, 17, 4096, 9001]  # below a block, and several of them, with and without a rest
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@pytest.fixture(scope="module")
def alone():
    with Ranks(1) as ranks:  # a process of its own, in which nothing has imported Triton
        yield lambda *args: ranks.run(*args)[0]


def problem(columns: int, dtype, prior: bool = False, **options):
    """Logits of so many real columns, then padding, then somebody else's memory behind each row; and their call."""
    generator = torch.Generator().manual_seed(0)
    width = columns + PADDING
    memory = torch.randn(6, width + 5, generator=generator).to(dtype)
    target = torch.randint(columns, (6,), generator=generator)
    target[IGNORED] = -100
    shard, options = VocabShard(0, width, columns), LossOptions(label_smoothing=0.1, **options)
    prior = torch.full((columns,), 1 / columns) if prior else None
    return memory[:, :width], target, LossCall(target, shard, options, prior, torch.float32, dtype)


def once_where_needed(columns: int) -> torch.Tensor:
    """1 for each logit of a row with a label that is not padding."""
    needed = torch.zeros(6, columns + PADDING, dtype=torch.int64)
    needed[LABEL_ROWS, :columns] = 1
    return needed


def statistics_seen(columns: int, dtype, options: dict):
    logits, target, call = problem(columns, dtype, **options)
    with watched() as launches:
        from smoothing import passes_triton

        passes_triton.statistics(logits, target, call)
    (launch,) = launches
    return launch.reads(logits), launch.writes(launch.tensors[3]), call.prior is not None and launch.reads(call.prior)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", SIZES)
def test_statistics_take_one_read(alone, columns, kind, dtype):
    reads, writes, prior = alone(statistics_seen, columns, dtype, KINDS[kind])
    _, target, _ = problem(columns, dtype)
    expected = once_where_needed(columns)
    expected[LABEL_ROWS, target[LABEL_ROWS]] += 1  # the label's logit once more, by its place
    assert torch.equal(reads, expected)
    assert writes.shape == (4, 6) and (writes == 1).all()
    assert kind != "prior" or (prior == len(LABEL_ROWS)).all()


def gradient_seen(columns: int, dtype, options: dict, where: str):
    logits, target, call = problem(columns, dtype, **options)
    maximum, scale, weight = (torch.ones(6) for _ in range(3))
    if where == "elsewhere":
        out = torch.empty_like(logits)
    else:
        out = logits if where == "in place" else products.narrowed(logits, torch.float16)
    with watched() as launches:
        from smoothing import passes_triton

        passes_triton.gradient(logits, target, call, maximum, scale, weight, out)
    (launch,) = launches
    return launch.reads(logits), launch.writes(out), launch.stores.whole()[0].size - out.numel()


@pytest.mark.parametrize("where", ["elsewhere", "in place", "narrowed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", SIZES)
def test_a_gradient_takes_one_read_and_one_write(alone, columns, kind, where):
    reads, writes, more = alone(gradient_seen, columns, torch.float32, KINDS[kind], where)
    assert torch.equal(reads, once_where_needed(columns))
    assert (writes == 1).all() and more == 0


def combine_seen(with_prior: bool):
    _, target, call = problem(300, torch.float32)
    stats = torch.rand(1, 4, 6) if with_prior else torch.rand(1, 3, 6)
    with watched() as launches:
        from smoothing import passes_triton

        passes_triton.combine(stats, None, target, call, with_prior)
    (launch,) = launches
    return launch.reads(stats)[0], [launch.writes(tensor) for tensor in launch.tensors[-3:]]


@pytest.mark.parametrize("with_prior", [True, False])
def test_what_is_between_them_is_written_once(alone, with_prior):
    reads, writes = alone(combine_seen, with_prior)
    assert reads[0].tolist() == [2] * 6 and (reads[1:] == 1).all()
    assert [tuple(x.shape) for x in writes] == [(2, 6), (4, 6), (6,)] and all((x == 1).all() for x in writes)


def scale_seen(count: int, factor: float):
    gradient, by = torch.ones(count), torch.tensor(factor)
    with watched() as launches:
        from smoothing import passes_triton

        passes_triton.scale(gradient, by)
    return launches[0].reads(gradient), launches[0].writes(gradient)


@pytest.mark.parametrize("count", [1, 16384, 40_003])
def test_a_gradient_times_one_is_not_touched(alone, count):
    for factor, times in ((1.0, 0), (0.5, 1)):
        for touched in alone(scale_seen, count, factor):
            assert (touched == times).all()
