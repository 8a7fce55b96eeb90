"""Both losses where the tensors lie on a GPU, if there is one; on the CPU the same lines run, and say little new.

One rank, and two gloo ranks that share the device. Synchronisations and graphs are looked at on a GPU alone.
"""

import warnings

import pytest
import torch
import torch.distributed as dist

from smoothing import smoothed_cross_entropy, vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from tests.smoothing.linear.test_fused_equiv import NAMES, Problem, assert_equals_plain, my_shard, upstream_for
from tests.support.cases import CASES
from tests.support.ranks import pool
from tests.test_sharded_equiv import assert_equals_dense

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMPILING = 300.0  # seconds: each case may need kernels of its own
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")


def placed(*tensors):
    return [None if x is None else x.detach().to(DEVICE).requires_grad_(x.requires_grad) for x in tensors]


def sharded_there(case, dtype) -> dict:
    logits, target, options = case.share(dist.get_rank(), dtype)
    logits, target, prior = placed(logits.requires_grad_(), target, options.pop("smoothing_prior", None))
    loss = vocab_parallel_cross_entropy(
        logits, target, my_shard(case), smoothing_prior=prior, reduction="none", **options
    )
    (loss * upstream_for(case).to(DEVICE, loss.dtype)).sum().backward()
    return {"loss": loss.detach().cpu(), "grad": logits.grad.cpu(), "logits_unchanged": True}


def fused_there(case, dtype, how: str) -> dict:
    rank = dist.get_rank()
    hidden, weight, bias = placed(*Problem(case).tensors(dtype, slice(*case.bounds[rank])))
    _, target, options = case.share(rank, dtype)
    target, prior = placed(target, options.pop("smoothing_prior", None))
    options |= {"bias": bias, "smoothing_prior": prior, "reduction": how, "chunk_bytes": 600}
    loss = vocab_parallel_linear_cross_entropy(hidden, weight, target, my_shard(case), **options)
    (loss * upstream_for(case).to(DEVICE, loss.dtype) if how == "none" else loss).sum().backward()
    grads = [None if x is None else x.grad.cpu() for x in (hidden, weight, bias)]
    return {"loss": loss.detach().cpu(), "hidden": grads[0], "weight": grads[1], "bias": grads[2]}


def every(function, calls: list[tuple]) -> list[dict]:
    return [function(*call) for call in calls]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_sharded_loss(size, dtype):
    cases = [CASES[name](size) for name in CASES]
    for case, *results in zip(
        cases, *pool(size).run(every, sharded_there, [(c, dtype) for c in cases], time_limit=COMPILING), strict=True
    ):
        assert_equals_dense(case, results, dtype)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("how", ["sum", "none"])
def test_fused_loss(size, dtype, how):
    cases = [CASES[name](size) for name in NAMES]
    calls = [(case, dtype, how) for case in cases]
    for case, *results in zip(cases, *pool(size).run(every, fused_there, calls, time_limit=COMPILING), strict=True):
        reduce = torch.sum if how == "sum" else None
        assert_equals_plain(case, results, dtype, reduce=reduce, rounded_logits=DEVICE.type == "cuda")


def step(head: str, ignored: int = 0):
    """A forward and backward on the device, and its labels; so many tokens have none."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(500, (64,), generator=generator)
    target[:ignored] = -100
    target = target.to(DEVICE)
    hidden = torch.randn(64, 32, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()
    weight = torch.randn(500, 32, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()

    def run(told: bool = True):
        hidden.grad = weight.grad = None
        if head == "fused":
            options = {"label_smoothing": 0.1, "label_tokens": len(target) - ignored if told else None}
            loss = vocab_parallel_linear_cross_entropy(hidden, weight, target, **options)
        else:
            loss = smoothed_cross_entropy(hidden @ weight.T, target, label_smoothing=0.1)
        loss.backward()
        return loss.detach(), weight.grad

    return run, target


@pytest.mark.parametrize("head", ["fused", "sharded"])
def test_a_step_is_repeatable(head):
    run, _ = step(head)
    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@on_gpu
@pytest.mark.parametrize("head", ["fused", "sharded"])
def test_the_host_waits_for_nothing(head):
    """Nor in a step with another number of labels, which nothing was kept of."""
    step(head)[0]()
    run, _ = step(head, ignored=7)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not [str(warning.message) for warning in seen if "synchroniz" in str(warning.message).lower()]


@on_gpu
@pytest.mark.parametrize("head", ["fused", "sharded"])
@pytest.mark.parametrize("ignored", [0, 7])
def test_a_captured_graph_gives_the_same(head, ignored):
    """Also with other labels, and another number of them, in the place of those that it was captured with."""
    run, target = step(head, ignored)
    others = torch.where(target == -100, 5, target.roll(1))
    others[:20] = -100
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    for labels in (target.clone(), others):
        target.copy_(labels)
        graph.replay()
        torch.cuda.synchronize()
        got_now = [x.clone() for x in got]
        for first, second in zip(got_now, run(told=False), strict=True):
            torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-4)
