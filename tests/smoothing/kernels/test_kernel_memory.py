"""How often the kernels touch each element: one read for the statistics, one read and one write for gradients.

Rows without a label are not read, padding columns neither, and everything is written. That every launch of every case
stays inside its tensors and races with nothing is checked in `test_kernels.py`, which runs all of them `watched`;
that such faults would be seen, here, by a kernel that has them.
"""

import importlib.util
import itertools

import pytest
import torch

from smoothing import VocabShard
from smoothing.core.call import LossCall
from smoothing.core.options import LossOptions
from smoothing.linear import matmul
from tests.support.cases import in_rotation
from tests.support.kernel_memory import watched
from tests.support.ranks import Ranks

# not imported here: Triton reads TRITON_INTERPRET when it is imported, and the ranks import this file
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

IGNORED = [1, 4]
LABEL_ROWS = torch.tensor([0, 2, 3, 5])
KINDS = {"uniform": {}, "prior": {"prior": True}, "capped": {"logit_softcap": 30.0}}
SIZES = [(1, 6), (15, 1), (17, 0), (8192, 0), (9001, 6)]  # real columns, padding: within a block, two, and a rest
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = list(itertools.product(SIZES, KINDS))
# where a gradient is written; the first two in one dtype in turn, so that every kind and every size meets each
WRITTEN = [(shape, "elsewhere", dtype) for shape, dtype in in_rotation(SHAPES, DTYPES)]
WRITTEN += [(shape, "in place", dtype) for shape, dtype in in_rotation(SHAPES, DTYPES, shift=1)]
WRITTEN += [(shape, "narrowed", "fp32") for shape in SHAPES]


@pytest.fixture(scope="module")
def alone():
    with Ranks(1) as ranks:  # a process of its own, in which nothing has imported Triton
        yield lambda *args: ranks.run(*args)[0]


def room(shape, dtype, rows_apart: int, columns_apart: int = 1):
    """A matrix of random numbers in memory that may be much larger; what lies between takes no room."""
    rows, columns = shape
    memory = torch.empty((rows - 1) * rows_apart + (columns - 1) * columns_apart + 1, dtype=dtype)
    matrix = memory.as_strided(shape, (rows_apart, columns_apart))
    return matrix.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def problem(size: tuple[int, int], dtype, prior: bool = False, strides=None, **options):
    """Logits of so many real columns, then padding, then somebody else's memory behind each row; and their call."""
    (columns, padding), generator = size, torch.Generator().manual_seed(0)
    width = columns + padding
    target = torch.randint(columns, (6,), generator=generator)
    target[IGNORED] = -100
    shard, options = VocabShard(0, width, columns), LossOptions(label_smoothing=0.1, **options)
    prior = torch.full((columns,), 1 / columns) if prior else None
    logits = room((6, width), dtype, *(strides or (width + 5, 1)))
    return logits, target, LossCall(target, shard, options, prior, torch.float32, dtype)


def once_where_needed(size: tuple[int, int]) -> torch.Tensor:
    """1 for each logit of a row with a label that is not padding."""
    columns, padding = size
    needed = torch.zeros(6, columns + padding, dtype=torch.int64)
    needed[LABEL_ROWS, :columns] = 1
    return needed


def statistics_seen(size, dtype, options: dict):
    logits, target, call = problem(size, dtype, **options)
    with watched() as launches:
        from smoothing.kernels import triton_ops

        triton_ops.statistics(logits, target, call)
    (launch,) = launches
    return launch.reads(logits), launch.writes(launch.tensors[3]), launch.reads(launch.tensors[2])


@pytest.mark.parametrize(("shape", "dtype"), in_rotation(SHAPES, DTYPES))
def test_statistics_take_one_read(alone, shape, dtype):
    (size, kind), dtype = shape, DTYPES[dtype]
    reads, writes, prior_reads = alone(statistics_seen, size, dtype, KINDS[kind])
    _, target, _ = problem(size, dtype)
    expected = once_where_needed(size)
    expected[LABEL_ROWS, target[LABEL_ROWS]] += 1  # the label's logit once more, by its place
    assert torch.equal(reads, expected)
    assert writes.shape == (4, 6) and (writes == 1).all()
    assert kind != "prior" or (prior_reads == len(LABEL_ROWS)).all()


def gradient_seen(size, dtype, options: dict, where: str):
    logits, target, call = problem(size, dtype, **options)
    maximum, scale, weight = (torch.ones(6) for _ in range(3))
    if where == "elsewhere":
        out = torch.empty_like(logits)
    else:
        out = logits if where == "in place" else matmul.narrowed(logits, torch.bfloat16)
    with watched() as launches:
        from smoothing.kernels import triton_ops

        triton_ops.gradient(logits, target, call, maximum, scale, weight, out)
    (launch,) = launches
    return launch.reads(logits), launch.writes(out), len(launch.stores.elements()[0]) - out.numel()


@pytest.mark.parametrize(("shape", "where", "dtype"), WRITTEN)
def test_a_gradient_takes_one_read_and_one_write(alone, shape, where, dtype):
    size, kind = shape
    reads, writes, more = alone(gradient_seen, size, DTYPES[dtype], KINDS[kind], where)
    assert torch.equal(reads, once_where_needed(size))
    assert (writes == 1).all() and more == 0


@pytest.mark.parametrize("strides", [(2**29, 1), (1, 2**29)], ids=["rows", "columns"])
def test_places_past_32_bits(alone, strides):
    """The last row or column is more than 2³¹ elements from the first."""
    size = (6, 0)
    for seen in (statistics_seen, gradient_seen):
        reads, *_ = alone(seen, size, torch.float16, {"strides": strides}, *["in place"] * (seen is gradient_seen))
        assert reads[LABEL_ROWS].all() and not reads[IGNORED].any()


def combine_seen(with_prior: bool, count: int):
    _, _, call = problem((300, 0), torch.float32)
    stats, target = torch.rand(1, 4 if with_prior else 3, count), torch.zeros(count, dtype=torch.int64)
    with watched() as launches:
        from smoothing.kernels import triton_ops

        triton_ops.combine(stats, None, target, call, with_prior)
    (launch,) = launches
    return launch.reads(stats)[0], [launch.writes(tensor) for tensor in launch.tensors[-4:]]


@pytest.mark.parametrize("with_prior", [True, False])
@pytest.mark.parametrize("count", [6, 128, 300])
def test_what_is_between_them_is_written_once(alone, with_prior, count):
    reads, writes = alone(combine_seen, with_prior, count)
    assert (reads[0] == 2).all() and (reads[1:] == 1).all()
    assert [tuple(x.shape) for x in writes] == [(2, count), (4, count), (count,), (3, -(-count // 128))]
    assert all((x == 1).all() for x in writes)


def scale_seen(count: int, factor: float):
    gradient, by = torch.ones(count), torch.tensor(factor)
    with watched() as launches:
        from smoothing.kernels import triton_ops

        triton_ops.scale([gradient], by)
    return launches[0].reads(gradient), launches[0].writes(gradient)


@pytest.mark.parametrize("count", [1, 16384, 40_003])
def test_a_gradient_times_one_is_not_touched(alone, count):
    for factor, times in ((1.0, 0), (0.5, 1)):
        for touched in alone(scale_seen, count, factor):
            assert (touched == times).all()


def toy(wrong: str | None) -> None:
    """Two programs that double four numbers each; and what may be wrong with that."""
    with watched():
        from tests.support import toy_kernels

        toy_kernels.double[(2,)](torch.ones(8), torch.empty(8), torch.zeros(8), WRONG=wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("past the end", "touches 1 elements outside"),
        ("same place", "writes an element twice"),
        ("neighbour", "reads 32 bytes that another program writes"),
        ("too late", "reads 32 bytes after it has written over them"),
        ("atomic", "atomics are not followed"),
    ],
)
def test_what_is_wrong_is_seen(alone, wrong, said):
    alone(toy, None)
    with pytest.raises(AssertionError, match=said), Ranks(1) as ranks:
        ranks.run(toy, wrong)
