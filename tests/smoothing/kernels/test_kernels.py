"""The Triton kernels in Triton's interpreter on the CPU, held to the same truth as the torch operations.

One and two gloo ranks. Every launch is `watched`: it stays inside its tensors, and no two programs race. What the
interpreter cannot show, a GPU must: `make bench-gpu` checks before it times.
"""

import contextlib
import importlib.util
import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from smoothing import VocabShard, vocab_parallel_cross_entropy
from smoothing.core.call import LossCall
from smoothing.core.options import LossOptions
from smoothing.kernels import dispatch, torch_ops
from smoothing.linear import matmul
from tests.smoothing.linear.test_fused_equiv import NAMES, assert_equals_plain, fused
from tests.support.cases import CASES, build, in_rotation
from tests.support.kernel_memory import watched
from tests.support.ranks import Allocations, Ranks
from tests.test_sharded_equiv import assert_equals_dense, my_shard, sharded, upstream_for

# not imported here: Triton reads TRITON_INTERPRET when it is imported, and the ranks import this file
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

HARD = [name for name in CASES if not CASES[name](1).soft]
FUSED = [name for name in HARD if name in NAMES]
KERNELS = {"statistics", "combine", "gradient"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A kernel widens what it reads and narrows what it writes, whatever the case: each case runs in one dtype in turn,
# and one reduction of the fused head; and these, which take most branches of a kernel, in all.
IN_ALL = ("padding-shard", "softcap-z-loss-prior-padded")


@contextlib.contextmanager
def interpreter():
    """The kernels instead of torch operations; yields the names of those that have run."""
    with watched():
        from smoothing.kernels import triton_ops

        plain, ran = {name: getattr(triton_ops, name) for name in KERNELS}, set()

        def noted(name: str):
            def run(*args, **kwargs):
                ran.add(name)
                return plain[name](*args, **kwargs)

            return run

        def gradient(*args, **kwargs):
            ran.add("gradient")
            *rest, out = args
            if out.dtype != torch.bfloat16:
                return plain["gradient"](*args, **kwargs)
            # the interpreter cuts bf16 off where a device rounds to nearest
            return out.copy_(plain["gradient"](*rest, torch.empty_like(out, dtype=torch.float32), **kwargs))

        instead = {"statistics": noted("statistics"), "combine": noted("combine"), "gradient": gradient}
        with mock.patch.multiple(triton_ops, **instead):
            yield ran


def interpreted(function, *args, **kwargs):
    with interpreter() as ran:
        result = function(*args, **kwargs)
    assert ran == KERNELS or not result["grad" if "grad" in result else "hidden"].any()
    return result


@pytest.fixture(scope="module", params=[1, 2], ids="{}rank".format)
def few(request):
    with Ranks(request.param) as ranks:  # processes of their own, in which nothing has imported Triton
        yield ranks


@pytest.mark.parametrize(("name", "dtype"), in_rotation(HARD, DTYPES, IN_ALL))
def test_sharded_loss(few, name, dtype):
    case, dtype = CASES[name](few.size), DTYPES[dtype]
    results = few.run(interpreted, sharded, case, dtype, None, upstream_for(case), reduction="none")
    assert_equals_dense(case, results, dtype)


@pytest.mark.parametrize(("name", "way"), in_rotation(FUSED, itertools.product(DTYPES, ["sum", "none"]), IN_ALL, 1))
def test_fused_loss(few, name, way):
    dtype, how = way
    case, dtype = CASES[name](few.size), DTYPES[dtype]
    if dtype == torch.float16 and name.startswith("offset"):
        dtype = torch.bfloat16  # fp16 overflows
    upstream = upstream_for(case) if how == "none" else None
    results = few.run(interpreted, fused, case, dtype=dtype, reduction=how, upstream=upstream, chunk_bytes=600)
    assert_equals_plain(case, results, dtype, reduce=torch.sum if how == "sum" else None)


def test_many_tokens(few):
    """Several programs' worth for what is between the passes, the last of them with fewer."""
    case, dtype = build(few.size, tokens=300, vocab=37, pad=3, label_smoothing=0.1, z_loss=1e-3), torch.float32
    upstream = upstream_for(case)
    results = few.run(interpreted, sharded, case, dtype, None, upstream, reduction="none")
    assert_equals_dense(case, results, dtype)
    results = few.run(interpreted, fused, case, dtype=dtype, reduction="sum", upstream=None, chunk_bytes=4 * 40 * 200)
    assert_equals_plain(case, results, dtype, reduce=torch.sum)


def strided(values):
    """The same numbers, each with another one beside it."""
    return torch.stack([values, values + 1], 1)[:, 0]


def wide(inplace: bool, dtype):
    """A vocabulary of several blocks, cut unevenly, all tensors strided; and the largest new tensor."""
    case = build(2, tokens=5, vocab=9000, pad=7, split=[(0, 4097), (4097, 9007)], prior=True, label_smoothing=0.1)
    start, stop = case.bounds[dist.get_rank()]
    _, target, options = case.share(dist.get_rank(), dtype)
    logits = case.logits[:, start:stop].to(dtype).t().contiguous().t().requires_grad_()
    target, options["smoothing_prior"] = strided(target), strided(options["smoothing_prior"])
    with interpreter(), Allocations() as made:
        loss = vocab_parallel_cross_entropy(
            logits, target, my_shard(case), reduction="none", inplace_backward=inplace, **options
        )
        (grad,) = torch.autograd.grad((loss * upstream_for(case)).sum(), logits)
    return {"loss": loss.detach(), "grad": grad, "logits_unchanged": True}, max(made.bytes)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_blocks_any_stride_and_no_copy(dtype, inplace):
    case = build(2, tokens=5, vocab=9000, pad=7, split=[(0, 4097), (4097, 9007)], prior=True, label_smoothing=0.1)
    with Ranks(2) as ranks:
        results = ranks.run(wide, inplace, dtype)
    assert_equals_dense(case, [result for result, _ in results], dtype)
    for rank, (_, largest) in enumerate(results):
        start, stop = case.bounds[rank]
        logits_bytes = 4 * 5 * (stop - start)  # in fp32, as the gradient is for the interpreter's sake
        assert largest <= logits_bytes / 5 if inplace and dtype == torch.float32 else largest == logits_bytes


def written_over(write) -> torch.Tensor:
    """The logits' gradient after something was written over the loss."""
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with interpreter():
        loss = vocab_parallel_cross_entropy(logits, torch.arange(6), label_smoothing=0.1, reduction="none")
        loss = write(loss)
        loss.sum().backward()
    return logits.grad


def twice(loss):
    loss *= 2
    return loss


def nothing_left(loss):
    loss.detach().zero_()
    return loss


def test_a_loss_may_be_written_over():
    """It is the caller's: nothing that backward needs lies in its memory."""
    with Ranks(1) as ranks:
        (plain,), (doubled,), (kept,) = (ranks.run(written_over, how) for how in (torch.clone, twice, nothing_left))
    assert torch.equal(kept, plain) and torch.equal(doubled, 2 * plain)


def rounded_in_place(width: int, dtype) -> list[torch.Tensor]:
    """A gradient elsewhere; then by kernels and torch in the front of its logits' memory, and what lies behind."""
    case = build(1, tokens=5, vocab=9000, pad=width - 9000, label_smoothing=0.1)
    case.target[[1, 3]] = -100
    _, target, options = case.share(0, torch.float32)
    logits, shard = case.logits.float(), VocabShard(0, width, 9000)
    call = LossCall(target, shard, LossOptions(**options), None, torch.float32, torch.float32)
    combined, scale, _ = torch_ops.combine(*call.gather(torch_ops.statistics(logits, target, call)), target, call)
    numbers = (combined.maximum, scale, torch.linspace(0.5, 1, 5))

    def gradient(module, tile, out):
        return module.gradient(tile, target, call, *numbers, out)

    with watched():
        from smoothing.kernels import triton_ops

        results = [gradient(triton_ops, logits, torch.empty_like(logits, dtype=dtype))]
        for module in (triton_ops, torch_ops):
            memory = torch.cat([logits, torch.full((5, 7), 3.0)], 1)
            tile = memory[:, :width]
            results += [gradient(module, tile, matmul.narrowed(tile, dtype)), memory[:, width:]]
    return results


@pytest.mark.parametrize("width", [9000, 9001, 20_000])
def test_a_gradient_rounded_in_its_logits_memory(width):
    with Ranks(1) as ranks:
        ((elsewhere, kernels, behind_it, operations, behind),) = ranks.run(rounded_in_place, width, torch.float16)
    assert torch.equal(kernels, elsewhere) and elsewhere.any(1).tolist() == [True, False, True, False, True]
    torch.testing.assert_close(operations, elsewhere, rtol=1e-3, atol=1e-7)
    assert (behind_it == 3).all() and (behind == 3).all()


def scaled(count: int, factor: float, dtype):
    """Two gradients of so many elements scaled by the kernel, with two elements of somebody else's behind them."""
    memory = torch.linspace(-1, 1, count + 2).to(dtype)
    with watched():
        from smoothing.kernels import triton_ops

        triton_ops.scale([memory[: count // 2], memory[count // 2 : count], memory[:0]], torch.tensor(factor))
    return memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("factor", [1.0, -0.3, float("nan")])
def test_a_gradient_is_scaled(factor, dtype):
    with Ranks(1) as ranks:
        for count in (0, 1, 16384, 40_003):
            (memory,) = ranks.run(scaled, count, factor, dtype)
            given = torch.linspace(-1, 1, count + 2).to(dtype)
            assert torch.equal(memory[count:], given[count:])
            torch.testing.assert_close(memory[:count], given[:count] * factor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where Triton works")
def test_where_triton_cannot_launch_torch_operations_run(monkeypatch, caplog):
    """As on a GPU without a C compiler: the kernels can be imported, and what launches them cannot be made."""
    monkeypatch.setattr(dispatch, "_triton_works", {})
    monkeypatch.setattr(dispatch, "_logged", set())
    with caplog.at_level("INFO", "smoothing"):
        call = SimpleNamespace(soft=False, statistics_dtype=torch.float32)
        assert dispatch.backend_for(torch.device("cuda"), call) is torch_ops
    assert "the kernels need Triton, a C compiler" in caplog.text
    assert "backend of the loss on cuda: torch operations" in caplog.text
