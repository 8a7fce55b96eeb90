"""The fused head equals cross entropy of full fp64 logits: loss, and gradients of hidden states, weight and bias.

The torture cases of the logits' loss go through a matrix: `hidden = logits·Qᵀ`, `weight = Q` for an orthogonal Q has
those logits. Gloo ranks on the CPU; lower precision is held to twice the error of `F.linear` and `F.cross_entropy`.
"""

import functools
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from smoothing import (
    VocabShard,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from smoothing.linear import labelled_tokens, matmul
from smoothing.linear.chunks import chunk_length, default_chunk_bytes
from smoothing.linear.matmul import tile
from tests.support.cases import CASES, IGNORED, Case, build, dense_losses
from tests.support.ranks import Collectives, fresh_group, pool

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A product of finite numbers is never -inf in chosen columns only: these cases need the bias.
THROUGH_BIAS = ("minus-inf-columns", "minus-inf-shard")
NAMES = [name for name in CASES if not name.startswith("padding-nan") and not name.startswith("padding-shard-nan")]
ROUNDINGS = 8  # granted beside twice the error of the plain method; truth is fp64 itself and rounds too
GEMMS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm")


# What the ranks run.


class Problem:
    """A case as hidden states, weight and bias in fp64, and the logits they make."""

    def __init__(self, case: Case, bias: bool = False, seed: int = 1):
        generator = torch.Generator().manual_seed(seed)
        width = case.logits.shape[1]
        square = torch.randn(width, width, generator=generator, dtype=torch.float64)
        logits, ignored = case.logits.clone(), ~case.valid
        self.bias = torch.randn(width, generator=generator, dtype=torch.float64) if bias else None
        shut = torch.isneginf(logits[case.valid]).all(0) if case.valid.any() else torch.zeros(width, dtype=torch.bool)
        if shut.any():
            self.bias = torch.where(shut, -torch.inf, 0.0).double()
            logits[:, shut] = 0.0
        self.poison = ~logits.isfinite().all(1) & ignored
        logits[self.poison] = 0
        self.weight = torch.linalg.qr(square).Q if width > 1 else torch.ones(1, 1, dtype=torch.float64)
        self.hidden = (logits if self.bias is None or shut.any() else logits - self.bias) @ self.weight
        self.hidden[self.poison] = case.logits[self.poison]
        if case.vocab_size < width and bias:
            self.weight[case.vocab_size :] = torch.nan
        self.case = case

    def tensors(self, dtype, columns=slice(None)):
        """`hidden`, `weight`, `bias` as leaves in this dtype; this rank's rows."""
        given = (self.hidden, self.weight[columns], None if self.bias is None else self.bias[columns])
        return [None if x is None else x.to(dtype).clone().requires_grad_() for x in given]


def my_shard(case: Case, group=None) -> VocabShard:
    return VocabShard(*case.bounds[dist.get_rank()], case.vocab_size, group or dist.group.WORLD)


def fused(case: Case, dtype=torch.float64, bias=False, upstream=None, frozen=(), **more) -> dict:
    """Loss and gradients of this rank; `upstream` weighs the losses of reduction="none"."""
    rank = dist.get_rank()
    hidden, weight, bias_S = Problem(case, bias).tensors(dtype, slice(*case.bounds[rank]))
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias_S)):
        if tensor is not None:
            tensor.requires_grad_(name not in frozen)
    _, target, options = case.share(rank, dtype)
    loss = vocab_parallel_linear_cross_entropy(
        hidden, weight, target, my_shard(case), bias=bias_S, **(options | more)
    )
    (loss if upstream is None else loss * upstream.to(loss.dtype)).sum().backward()
    grads = [None if x is None else x.grad for x in (hidden, weight, bias_S)]
    return {"loss": loss.detach(), "hidden": grads[0], "weight": grads[1], "bias": grads[2]}


def many_fused(calls: list[dict]) -> list[dict]:
    return [fused(**call) for call in calls]


# What they are compared with.


def upstream_for(case: Case) -> torch.Tensor:
    return torch.tensor([1.0, -0.5, 2.0, 0.25]).repeat(len(case.target) // 4 + 1)[: len(case.target)]


def plain(case: Case, dtype, compute, bias=False, upstream=None, reduce=None) -> dict:
    """`F.linear` and `F.cross_entropy` on the tensors as rounded to `dtype`, computed in `compute`."""
    problem = Problem(case, bias)
    leaves = [None if x is None else x.detach().to(compute).requires_grad_() for x in problem.tensors(dtype)]
    vocab = case.vocab_size
    hidden = torch.where(case.valid[:, None], leaves[0], 0.0)
    logits = F.linear(hidden, leaves[1][:vocab], None if leaves[2] is None else leaves[2][:vocab])
    target = case.target[:, :vocab] if case.soft else case.target
    losses = dense_losses(logits, target, vocab, **case.options)
    weights = upstream_for(case).to(compute) if upstream is None else upstream.to(compute)
    (reduce(losses) if reduce else (losses * weights).sum()).backward()
    grads = [None if x is None else x.grad for x in leaves]
    total = reduce(losses).detach() if reduce else losses.detach()
    return {"loss": total, "hidden": grads[0], "weight": grads[1], "bias": grads[2]}


def joined(results: list[dict]) -> dict:
    """The ranks' results as one, their rows of the weight's gradient together."""
    whole = dict(results[0])
    for name in ("weight", "bias"):
        if whole[name] is not None:
            whole[name] = torch.cat([r[name] for r in results])
    return whole


def assert_at_most_twice_the_error(got, by_plain, truth, rounding, what):
    error = (got.double() - truth).abs().max()
    allowed = 2 * (by_plain.double() - truth).abs().max() + rounding
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def magnitudes(case: Case, bias: bool) -> dict:
    """How large the numbers are whose differences loss and gradients are: these round, whatever is left of them.

    A logit's rounding is relative to the logit, and shifts its probability by as much.
    """
    problem, valid = Problem(case, bias), case.valid
    logits = case.logits[valid].nan_to_num(neginf=0).abs().sum(0)
    hidden = problem.hidden[valid].abs().sum(0)
    largest = float(case.logits[valid].nan_to_num(neginf=0).abs().max()) if valid.any() else 0.0
    return {"loss": float(logits.max()) if len(logits) else 0.0, "hidden": largest} | {
        "weight": largest * float(hidden.max()) if len(hidden) else 0.0,
        "bias": largest * float(valid.sum()),
    }


def assert_equals_plain(case: Case, results: list[dict], dtype, bias=False, reduce=None, rounded_logits=False):
    """`rounded_logits`: these are of `dtype`, as the plain method's are, and a loss is granted its rounding too."""
    for name in ("loss", "hidden"):
        assert all(torch.equal(r[name], results[0][name]) for r in results), f"ranks hold different {name}"
    got = joined(results)
    truth = plain(case, dtype, torch.float64, bias, reduce=reduce)
    rival = plain(case, dtype, dtype, bias, reduce=reduce)
    assert got["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got["loss"].shape == truth["loss"].shape
    sizes = magnitudes(case, bias)
    for name in ("loss", "hidden", "weight", "bias"):
        if truth[name] is None or not truth[name].numel():
            continue
        assert name == "loss" or got[name].dtype == dtype
        ulp = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        size = float(truth[name].abs().max())
        rounding = ROUNDINGS * ulp * max(size, sizes[name], 1.0)
        if (name != "loss" or rounded_logits) and dtype in (torch.bfloat16, torch.float16):
            rounding += torch.finfo(dtype).eps * size
        assert_at_most_twice_the_error(got[name], rival[name], truth[name], rounding, name)
    assert (got["hidden"][~case.valid] == 0).all(), "an ignored row takes part"
    assert (got["weight"][case.vocab_size :] == 0).all(), "padding takes part"


# Loss and gradients.


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_case_equals_the_plain_head(ranks, dtype):
    names = [name for name in NAMES if not (dtype == torch.float16 and name.startswith("offset"))]  # overflows there
    cases = {name: CASES[name](ranks.size) for name in names}
    for how in ("sum", "none"):
        calls = [
            {"case": case, "dtype": dtype, "reduction": how}
            | ({"upstream": upstream_for(case)} if how == "none" else {})
            for case in cases.values()
        ]
        for (name, case), *results in zip(cases.items(), *ranks.run(many_fused, calls), strict=True):
            try:
                assert_equals_plain(case, results, dtype, reduce=torch.sum if how == "sum" else None)
            except AssertionError as error:
                raise AssertionError(f"{name}, reduction={how}: {error}") from None


def keeping_every_row(calls: list[dict]) -> list[dict]:
    """As while a CUDA graph is captured: tokens without a label go through the head."""
    plain, labelled_tokens.keeps_every_row = labelled_tokens.keeps_every_row, lambda device: True
    try:
        return many_fused(calls)
    finally:
        labelled_tokens.keeps_every_row = plain


@pytest.mark.parametrize("how", ["sum", "mean", "none"])
def test_tokens_without_a_label_weigh_nothing_where_they_are_kept(ranks, how):
    cases = {name: CASES[name](ranks.size) for name in NAMES}
    calls = [
        {"case": case, "dtype": torch.float32, "bias": True, "reduction": how, "chunk_bytes": 600}
        | ({"upstream": upstream_for(case)} if how == "none" else {})
        for case in cases.values()
    ]
    for (name, case), *results in zip(cases.items(), *ranks.run(keeping_every_row, calls), strict=True):
        reduce = {"sum": torch.sum, "mean": lambda x, c=case: x.sum() / c.valid.sum().clamp(min=1), "none": None}[how]
        try:
            assert_equals_plain(case, results, torch.float32, bias=True, reduce=reduce)
        except AssertionError as error:
            raise AssertionError(f"{name}, reduction={how}: {error}") from None


SOME = ["padded", "prior", "soft-prior-padded", "z-loss", "softcap-z-loss-prior-padded", "ignored-nan-inf"]
SOME += ["padding-shard", "lopsided", "confident-wrong-smoothed", "all-ignored", "no-token", "one-word"]


@pytest.mark.parametrize("chunk_bytes", [1, 200, 3000])
@pytest.mark.parametrize("how", ["sum", "none"])
def test_chunks_and_bias_change_nothing(ranks, how, chunk_bytes):
    """Chunks of one row, of a few and with a rest; a bias; NaN in the weight's padding."""
    cases = [CASES[name](ranks.size) for name in SOME]
    upstream = [upstream_for(case) if how == "none" else None for case in cases]
    calls = [
        {
            "case": case,
            "dtype": torch.float32,
            "bias": True,
            "upstream": weights,
            "reduction": how,
            "chunk_bytes": chunk_bytes,
        }
        for case, weights in zip(cases, upstream, strict=True)
    ]
    reduce = torch.sum if how == "sum" else None
    for case, *results in zip(cases, *ranks.run(many_fused, calls), strict=True):
        assert_equals_plain(case, results, torch.float32, bias=True, reduce=reduce)
        bias_grad = joined(results)["bias"]
        assert (bias_grad[case.vocab_size :] == 0).all()


REDUCTIONS = {
    "mean": ({}, lambda losses, valid: losses.sum() / valid),
    "sum": ({"reduction": "sum"}, lambda losses, valid: losses.sum()),
    "mean-by-int": ({"num_items_in_batch": 29}, lambda losses, valid: losses.sum() / 29),
    "mean-by-tensor": ({"num_items_in_batch": torch.tensor(29)}, lambda losses, valid: losses.sum() / 29),
}


@pytest.mark.parametrize("how", REDUCTIONS)
@pytest.mark.parametrize("scaled", [1.0, -1.0, -0.375])
def test_reductions_of_a_scaled_loss(ranks, how, scaled):
    names = ["padded", "soft-smoothing", "softcap-z-loss-prior-padded", "one-valid", "all-ignored"]
    options, reduce = REDUCTIONS[how]
    cases = [CASES[name](ranks.size) for name in names]
    calls = [{"case": case, "bias": True, "upstream": torch.tensor(scaled), **options} for case in cases]
    for case, *results in zip(cases, *ranks.run(many_fused, calls), strict=True):
        number = case.valid.sum().clamp(min=1)
        truth = plain(case, torch.float64, torch.float64, True, reduce=lambda x, n=number: scaled * reduce(x, n))
        got = joined(results)
        torch.testing.assert_close(got["loss"] * scaled, truth["loss"], rtol=1e-13, atol=0)
        for name in ("hidden", "weight", "bias"):
            torch.testing.assert_close(got[name], truth[name], rtol=0, atol=1e-12)


def test_frozen_inputs_change_nothing_else(ranks):
    case = CASES["padded"](ranks.size)
    whole = ranks.run(fused, case, bias=True)
    for frozen in (("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")):
        for how in ("mean", "none"):
            upstream = (
                torch.full((len(case.target),), 1 / int(case.valid.sum()), dtype=torch.float64)
                if how == "none"
                else None
            )
            results = ranks.run(fused, case, bias=True, frozen=frozen, reduction=how, upstream=upstream)
            for got, all_of_it in zip(results, whole, strict=True):
                for name in ("hidden", "weight", "bias"):
                    if name in frozen:
                        assert got[name] is None
                    else:
                        torch.testing.assert_close(got[name], all_of_it[name], rtol=0, atol=1e-14)


def statistics(case: Case, leading):
    """Statistics of the fused head, and of the loss from logits that is tested elsewhere."""
    rank = dist.get_rank()
    problem = Problem(case)
    logits, target, options = case.share(rank, torch.float64)
    hidden, weight, _ = problem.tensors(torch.float64, slice(*case.bounds[rank]))
    shape = (*leading, -1)
    hidden, target = hidden.reshape(*shape, hidden.shape[-1]), target.reshape(shape)
    got = vocab_parallel_linear_cross_entropy(hidden, weight, target, my_shard(case), return_stats=True, **options)
    logits = logits.reshape(*shape, logits.shape[-1])
    want = vocab_parallel_cross_entropy(logits, target, my_shard(case), return_stats=True, **options)
    assert not any(x.requires_grad for x in got[1])
    return (got[0].detach(), got[1]), want


@pytest.mark.parametrize("leading", [(), (2,)], ids=["flat", "batched"])
@pytest.mark.parametrize("name", ["padded", "ties", "softcap-z-loss-prior-padded", "ignored-nan-inf", "all-ignored"])
def test_statistics_are_those_of_the_sharded_loss(ranks, name, leading):
    for got, want in ranks.run(statistics, CASES[name](ranks.size), leading):
        torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-14)
        for field, mine, theirs in zip(want[1]._fields, got[1], want[1], strict=True):
            if not (field == "correct" and name == "ties"):  # a product does not keep ties exact
                torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12, msg=lambda m, f=field: f"{f}: {m}")


# What it costs.


class Products(TorchDispatchMode):
    """Multiplications of every GEMM issued under it."""

    def __init__(self):
        super().__init__()
        self.flops: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in GEMMS:
            first, second = [x for x in args if isinstance(x, torch.Tensor) and x.dim() == 2][-2:]
            self.flops.append(first.shape[0] * first.shape[1] * second.shape[1])
        return func(*args, **(kwargs or {}))


def cost(case: Case, frozen=(), grad=True, dtype=torch.float32, hidden_size=16, **options) -> dict:
    """GEMMs in units of one product over all labelled tokens, and the collectives, of forward and backward."""
    start, stop = case.bounds[dist.get_rank()]
    hidden = torch.randn(len(case.target), hidden_size).to(dtype).requires_grad_("hidden" not in frozen)
    weight = torch.randn(stop - start, hidden_size).to(dtype).requires_grad_("weight" not in frozen)
    shard = my_shard(case, fresh_group())
    unit = int(case.valid.sum()) * max(0, min(stop, case.vocab_size) - start) * hidden_size
    with torch.set_grad_enabled(grad), Products() as ahead, Collectives() as out:
        loss = vocab_parallel_linear_cross_entropy(
            hidden, weight, case.target, shard, **(case.options | {"reduction": "mean"} | options)
        )
    with Products() as behind, Collectives() as back:
        if grad:
            loss.sum().backward()
    of = {"forward": sum(ahead.flops) / max(unit, 1), "backward": sum(behind.flops) / max(unit, 1)}
    return of | {"out": out.seen, "back": back.seen, "unit": unit}


COSTS = {
    "scalar": ({}, 3, 0),
    "weight-frozen": ({"frozen": ("weight",)}, 2, 0),
    "hidden-frozen": ({"frozen": ("hidden",)}, 2, 0),
    "no-grad": ({"grad": False}, 1, 0),
    "all-frozen": ({"frozen": ("hidden", "weight"), "grad": False}, 1, 0),
    "none": ({"reduction": "none"}, 1, 3),
    "none-weight-frozen": ({"reduction": "none", "frozen": ("weight",)}, 1, 2),
    "bf16": ({"dtype": torch.bfloat16}, 3, 0),
    "softcap": ({"logit_softcap": 5.0}, 3, 0),
}


@pytest.mark.parametrize("chunk_bytes", [None, 3000])
@pytest.mark.parametrize("name", COSTS)
def test_products(name, chunk_bytes):
    how, forward, backward = COSTS[name]
    case = build(2, tokens=40, vocab=300, label_smoothing=0.1)
    case.target[::3] = IGNORED
    for result in pool(2).run(cost, case, chunk_bytes=chunk_bytes, **how):
        assert (result["forward"], result["backward"]) == (forward, backward)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_every_rank_issues_the_same_collectives(softcap):
    """Uneven shards, one all padding: the widest decides on the chunks. Sizes are bytes this rank sends.

    A softcap needs Σ z_v from the logits. Two tiles take turns with it, and where hidden states are frozen, so that
    statistics travel while the next chunk's logits are computed; else they travel while e·W is.
    """
    tokens, hidden, vocab = 10, 16, 48
    bounds = [(0, 8), (8, 40), (40, 48), (48, 64)]
    options = {"label_smoothing": 0.1} | ({} if softcap is None else {"logit_softcap": softcap})
    case = build(4, tokens=tokens, vocab=vocab, pad=16, split=bounds, **options)
    labelled = int(case.valid.sum())
    sent_a_token = 12 if softcap is None else 16
    for how, with_hidden in (((), True), (("hidden",), False)):
        rows = 4 if softcap is None and with_hidden else 2
        length = chunk_length(labelled, rows)
        chunks = [min(length, labelled - start) for start in range(0, labelled, length)]
        results = pool(4).run(cost, case, chunk_bytes=4 * 32 * 4, frozen=how, hidden_size=hidden)
        for result in results:
            names = [(("gather" if "gather" in name else "reduce"), sent) for name, sent in result["out"]]
            expected = [("gather", 72)] + ([("reduce", 4 * (hidden + 1))] if softcap is None else [])
            for n in chunks:
                expected += [("gather", sent_a_token * n)] + ([("reduce", 4 * n * hidden)] if with_hidden else [])
            assert sorted(names) == sorted(expected)
            assert softcap is not None or names == expected, "the statistics of a chunk travel while e·W is computed"
            assert result["out"] == results[0]["out"]
            assert result["back"] == []


def kept(case: Case, reduction: str, dtype):
    """Bytes that live on between forward and backward beside the inputs, and the largest tile ever made."""
    start, stop = case.bounds[dist.get_rank()]
    hidden = torch.randn(len(case.target), 8).to(dtype).requires_grad_()
    weight = torch.randn(stop - start, 8).to(dtype).requires_grad_()

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.untyped_storage().nbytes())
            return result

    gc.collect()
    old = {id(o) for o in gc.get_objects()}
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with Largest() as ahead, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = vocab_parallel_linear_cross_entropy(
            hidden, weight, case.target, my_shard(case), reduction=reduction, chunk_bytes=8192, **case.options
        )
    gc.collect()
    for thing in gc.get_objects():
        if id(thing) not in old and isinstance(thing, torch.Tensor):
            note(thing)
    with Largest() as behind:
        loss.sum().backward()
    for given in (hidden, weight, case.target):
        saved.pop(given.untyped_storage().data_ptr(), None)
    return sum(saved.values()), max(ahead.elements, behind.elements), hidden.nbytes + weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_is_the_gradients_and_one_chunk(reduction, dtype):
    tokens, vocab = 512, 1024
    case = build(2, tokens=tokens, vocab=vocab, label_smoothing=0.1, z_loss=1e-3)
    for saved, largest, gradients in pool(2).run(kept, case, reduction, dtype):
        extra = gradients if reduction == "mean" else 0
        assert saved <= extra + 64 * tokens + 4096
        assert largest <= max(8192, 4 * 8 * max(tokens, vocab // 2)) + 64 * tokens, "a tile of [T, S] was made"
        assert largest < tokens * vocab // 2


# Smoothing survives low precision.


def nobody_error(
    method: str, dtype: torch.dtype, scale: float, parameter: torch.dtype = torch.float32, tokens: int = 256
) -> float:
    """Relative error, against fp64, of what smoothing adds to grad_weight on rows that are nobody's target.

    It is the difference of two gradients, with ε = 0.1 and without, of a head that computes in `dtype`: by autocast
    if the `parameter` is fp32. One that is of `dtype` itself has its gradient rounded to that, softmax part and all:
    "rounded" is the least that this costs, the exact gradients rounded.
    """
    torch.manual_seed(0)
    vocab, hidden = 64 * tokens, 64
    hidden_TH = torch.randn(tokens, hidden).to(dtype)
    weight_VH = (torch.randn(vocab, hidden) * scale / hidden**0.5).to(dtype)
    target_T = torch.randint(vocab // 4, (tokens,))

    def gradient(epsilon, compute, loss):
        h, w = hidden_TH.to(compute), weight_VH.to(compute).clone().requires_grad_()
        with torch.autocast("cpu", dtype, enabled=compute == torch.float32):
            loss(h, w, epsilon).backward()
        return w.grad[vocab // 4 :].double()

    def plain(h, w, epsilon):
        return F.cross_entropy(F.linear(h, w), target_T, label_smoothing=epsilon)

    def fused(h, w, epsilon):
        return vocab_parallel_linear_cross_entropy(h, w, target_T, label_smoothing=epsilon)

    exact = [gradient(epsilon, torch.float64, plain) for epsilon in (0.1, 0.0)]
    if method == "rounded":
        got = [x.to(parameter).double() for x in exact]
    else:
        got = [gradient(epsilon, parameter, {"fused": fused, "plain": plain}[method]) for epsilon in (0.1, 0.0)]
    truth = exact[0] - exact[1]
    return ((got[0] - got[1] - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smoothing_part_of_grad_weight(dtype, scale):
    assert nobody_error("fused", dtype, scale) <= 1e-4
    assert nobody_error("plain", dtype, scale) >= 2e-2  # what autograd through low-precision logits makes of it


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_parameter_loses_no_more_than_its_own_rounding(dtype, scale):
    fused, least = (nobody_error(method, dtype, scale, parameter=dtype) for method in ("fused", "rounded"))
    assert fused <= 1.01 * least < nobody_error("plain", dtype, scale, parameter=dtype)


def test_a_bf16_weight_gets_its_gradient_rounded_once():
    torch.manual_seed(0)
    hidden, weight = torch.randn(256, 64).bfloat16(), (torch.randn(4096, 64) * 0.2).bfloat16().requires_grad_()
    target = torch.randint(4096, (256,))
    vocab_parallel_linear_cross_entropy(hidden, weight, target, label_smoothing=0.1, chunk_bytes=200_000).backward()
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.double() @ exact.T, target, label_smoothing=0.1).backward()
    size = exact.grad.abs().clamp(min=1e-3 * exact.grad.abs().max())  # sums that cancel keep fp32's rounding
    assert ((weight.grad.double() - exact.grad).abs() / size).max() <= 1.05 * 2**-8


# As part of a program.


def small(dtype=torch.float64, tokens=6, vocab=11, hidden=4):
    generator = torch.Generator().manual_seed(3)
    shapes = ((tokens, hidden), (vocab, hidden), (vocab,))
    leaves = [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
    target = torch.randint(vocab, (tokens,), generator=generator)
    target[2] = IGNORED
    return *leaves, target


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-2}, {"logit_softcap": 2.0}], ids=str)
def test_gradcheck(options):
    """With reduction="none"; gradcheck differentiates one graph many times, which a scalar loss refuses."""
    *leaves, target = small()

    def loss(hidden, weight, bias):
        return vocab_parallel_linear_cross_entropy(
            hidden, weight, target, bias=bias, label_smoothing=0.2, reduction="none", chunk_bytes=200, **options
        )

    assert torch.autograd.gradcheck(loss, leaves)


def grads_of(function, *leaves):
    for leaf in leaves:
        leaf.grad = None
    loss = function(*leaves)
    loss.backward()
    return [loss.detach(), *(leaf.grad.clone() for leaf in leaves)]


@pytest.mark.parametrize("wrap", ["reentrant", "not-reentrant", "compiled"])
@pytest.mark.parametrize("how", ["mean", "none"])
def test_checkpointed_and_compiled(wrap, how):
    *leaves, target = small(torch.float32)

    def loss(hidden, weight, bias):
        value = vocab_parallel_linear_cross_entropy(
            hidden * 2, weight, target, bias=bias, label_smoothing=0.2, reduction=how
        )
        return (value * 3).sum()

    if wrap == "compiled":
        other = torch.compile(loss, backend="aot_eager")
    else:
        other = functools.partial(checkpoint, loss, use_reentrant=wrap == "reentrant")
    for got, want in zip(grads_of(other, *leaves), grads_of(loss, *leaves), strict=True):
        torch.testing.assert_close(got, want)


def test_second_backward_is_refused_or_right():
    *leaves, target = small()
    loss = vocab_parallel_linear_cross_entropy(leaves[0], leaves[1], target, bias=leaves[2], label_smoothing=0.1)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second time.*reduction='none'"):
        loss.backward()
    losses = vocab_parallel_linear_cross_entropy(*leaves[:2], target, bias=leaves[2], reduction="none")
    first = torch.autograd.grad(losses.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(losses.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_is_refused():
    *leaves, target = small()
    loss = vocab_parallel_linear_cross_entropy(leaves[0], leaves[1], target)
    upstream = torch.ones((), dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(loss, leaves[0], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        (grad**2).sum().backward()


def test_hidden_states_are_let_go():
    *leaves, target = small(torch.float32)
    hidden = leaves[0] * 2
    gone = weakref.ref(hidden)
    loss = vocab_parallel_linear_cross_entropy(hidden, leaves[1], target)
    del hidden
    gc.collect()
    assert gone() is None
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_prior", [False, True], ids=["uniform", "prior"])
@pytest.mark.parametrize("how", ["mean", "none"])
def test_more_tokens_and_rows_than_are_taken_at_a_time(monkeypatch, dtype, with_prior, how):
    """Weights are widened in blocks of rows, Σ g·h and h·w̄ are taken of blocks of tokens; here of several each."""
    monkeypatch.setattr(matmul, "BLOCK_ELEMENTS", 7 * 8)  # 7 rows of 8
    torch.manual_seed(0)
    hidden, weight = torch.randn(9001, 8).to(dtype), torch.randn(37, 8).to(dtype)
    target = torch.randint(37, (9001,))
    q = torch.rand(37).softmax(0) if with_prior else torch.full((37,), 1 / 37)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    options = {"label_smoothing": 0.4, "smoothing_prior": q if with_prior else None, "reduction": how}

    def plain(hidden, weight):
        log_p = F.log_softmax(hidden @ weight.T, dim=1)
        return F.nll_loss(log_p, target) * 0.6 - 0.4 * (log_p @ q.to(log_p.dtype)).mean()

    def fused(hidden, weight):
        return vocab_parallel_linear_cross_entropy(hidden, weight, target, **options).mean()

    truth = grads_of(plain, *(leaf.detach().double().requires_grad_() for leaf in leaves))
    for own, rival, exact in zip(grads_of(fused, *leaves), grads_of(plain, *leaves), truth, strict=True):
        error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (own, rival))
        assert error <= 2 * allowed + 2 * torch.finfo(own.dtype).eps


def test_the_budget_of_a_chunk():
    """Of a weight of 1 GiB in fp32: a quarter; on a device half. Of a small one, what products need."""
    assert default_chunk_bytes(2**30, device=False) == 2**28 and default_chunk_bytes(2**30, device=True) == 2**29
    assert default_chunk_bytes(1000, device=False) == 2**24 and default_chunk_bytes(1000, device=True) == 2**28


@pytest.mark.parametrize(("tokens", "most", "length"), [(8192, 2048, 2048), (8192, 2901, 2736), (1024, 96, 96)])
def test_chunks_of_a_multiple_of_eight(tokens, most, length):
    assert chunk_length(tokens, most) == length


def test_chunks_are_few_and_alike():
    for tokens in range(1, 700):
        for most in (1, 2, 7, 12, 16, 40, 100, 699, 5000):
            length = chunk_length(tokens, most)
            chunks = -(-tokens // length)
            assert chunks == -(-tokens // most) and length <= most + 7 * (chunks == 1)
            last = tokens - (chunks - 1) * length
            assert 2 * last >= length - 8 or length - last < chunks, (tokens, most, length)


def test_rows_of_a_tile_begin_where_a_device_wants_them():
    shape, there = (3, 1001), tile((3, 1001), torch.bfloat16, torch.device("meta"))
    assert there.shape == shape and there.stride() == (1024, 1)
    assert tile(shape, torch.float32, torch.device("cpu")).is_contiguous()


def test_smoothing_alone_is_exact_under_autocast():
    """ε = 1: what is left of the loss is lse - h·w̄, and h·w̄ is never rounded to bf16."""
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 16).bfloat16().float().requires_grad_() for n in (40, 50))
    target = torch.zeros(40, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = vocab_parallel_linear_cross_entropy(hidden, weight, target, label_smoothing=1.0, reduction="none")
    truth = F.cross_entropy(hidden.double() @ weight.double().T, target, label_smoothing=1.0, reduction="none")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-6)


def test_autocast_leaves_fp64_alone():
    *leaves, target = small(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = vocab_parallel_linear_cross_entropy(leaves[0], leaves[1], target)
    truth = F.cross_entropy(leaves[0] @ leaves[1].T, target)
    torch.testing.assert_close(loss, truth, rtol=1e-14, atol=0)


@pytest.mark.parametrize("number", [torch.tensor([7]), torch.tensor([[7.0]]), 7, 7.0], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_a_divisor_of_any_shape(number, grad):
    *leaves, target = small()
    with torch.set_grad_enabled(grad):
        loss = vocab_parallel_linear_cross_entropy(*leaves[:2], target, num_items_in_batch=number)
        other = vocab_parallel_cross_entropy(leaves[0] @ leaves[1].T, target, num_items_in_batch=number)
    truth = F.cross_entropy(leaves[0] @ leaves[1].T, target, reduction="sum") / 7
    for value in (loss, other):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=0)


def test_negative_probabilities_count_as_in_torch():
    *leaves, _ = small()
    target = torch.randn(6, 11, dtype=torch.float64)
    truth = F.cross_entropy(leaves[0] @ leaves[1].T, target)
    got = vocab_parallel_linear_cross_entropy(*leaves[:2], target)
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(vocab_parallel_cross_entropy(leaves[0] @ leaves[1].T, target), truth)


@pytest.mark.parametrize("how", ["mean", "none"])
def test_autocast_is_that_of_linear(how):
    *leaves, target = small(torch.float32, tokens=40, vocab=50, hidden=16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = vocab_parallel_linear_cross_entropy(
            leaves[0], leaves[1], target, bias=leaves[2], label_smoothing=0.1, reduction=how
        )
    loss.sum().backward()
    rounded = [leaf.detach().bfloat16().double().requires_grad_() for leaf in leaves]
    truth = F.cross_entropy(
        F.linear(*rounded), target, label_smoothing=0.1, reduction=how if how == "mean" else "sum"
    )
    truth.backward()
    torch.testing.assert_close(loss.sum().double(), truth, rtol=1e-5, atol=1e-6)
    for leaf, exact in zip(leaves, rounded, strict=True):
        assert leaf.grad.dtype == torch.float32
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_fp16_gradients_survive_until_loss_scaling():
    """1/N of a gradient underflows in fp16; what loss scaling saves must not be rounded away before it."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 8).half(), (torch.randn(32, 8) * 0.1).half().requires_grad_()
    target = torch.randint(32, (64,))
    loss = vocab_parallel_linear_cross_entropy(hidden, weight, target, num_items_in_batch=1_000_000)
    (loss * 65536).backward()
    exact = weight.detach().double().requires_grad_()
    (F.cross_entropy(hidden.double() @ exact.T, target, reduction="sum") * (65536 / 1e6)).backward()
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("soft", [False, True], ids=["prior", "soft"])
@pytest.mark.parametrize("how", ["mean", "none"])
def test_columns_without_any_weight_may_be_minus_inf(how, soft):
    """Where prior (or target) is 0, a logit of -inf is a column left out, not 0·inf."""
    hidden, weight, bias, target = small()
    kept = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    prior = torch.where(kept, 1 / kept.sum().double(), 0.0)
    target = torch.where(target == IGNORED, 0, kept.nonzero().squeeze(1)[target % int(kept.sum())])
    shut = bias.detach().masked_fill(~kept, -torch.inf)
    given = prior.expand(len(target), -1) if soft else target
    options = {"label_smoothing": 0.0} if soft else {"label_smoothing": 0.2, "smoothing_prior": prior}
    loss = vocab_parallel_linear_cross_entropy(hidden, weight, given, bias=shut, reduction=how, **options)
    logits = F.linear(hidden, weight[kept], bias.detach()[kept])
    among_kept = (kept.cumsum(0) - 1)[target]
    truth = F.cross_entropy(
        logits,
        prior[kept].expand_as(logits) if soft else among_kept,
        **({} if soft else {"label_smoothing": 0.2}),
        reduction=how,
    )
    torch.testing.assert_close(loss, truth)
    got, want = (torch.autograd.grad(value.sum(), [hidden, weight]) for value in (loss, truth))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("edited", ["target", "prior", "soft-target", "hidden", "weight"])
def test_what_was_changed_before_backward_is_noticed(edited):
    """With reduction="none" backward looks at the inputs again."""
    hidden, weight, _, target = small()
    target[2] = 0  # all labelled: the loss keeps the caller's own tensor
    prior = torch.full((11,), 1 / 11, dtype=torch.float64)
    given = prior.repeat(len(target), 1) if edited == "soft-target" else target
    loss = vocab_parallel_linear_cross_entropy(
        hidden, weight, given, label_smoothing=0.1, smoothing_prior=prior, reduction="none"
    )
    changed = {"target": given, "soft-target": given, "prior": prior, "hidden": hidden, "weight": weight}[edited]
    with torch.no_grad():
        changed.zero_()
    with pytest.raises(RuntimeError, match="inplace"):
        loss.sum().backward()


def test_tied_weight_gets_the_sum_of_both_gradients():
    *_, weight, _, target = small()
    hidden = weight[target.clamp(min=0)]
    loss = vocab_parallel_linear_cross_entropy(hidden, weight, target, label_smoothing=0.1)
    (got,) = torch.autograd.grad(loss, weight)
    (want,) = torch.autograd.grad(
        F.cross_entropy(weight[target.clamp(min=0)] @ weight.T, target, label_smoothing=0.1), weight
    )
    torch.testing.assert_close(got, want)


def test_ranks_hold_the_same_bits_of_a_large_hidden_gradient():
    case = build(4, tokens=300, vocab=400, label_smoothing=0.1)
    results = pool(4).run(fused, case, torch.float32, chunk_bytes=20_000)
    assert all(torch.equal(r["hidden"], results[0]["hidden"]) for r in results)


def in_pairs(case: Case, how: str) -> dict:
    """Ranks 0, 1 and ranks 2, 3 work apart, each pair on the whole vocabulary and on hidden states of its own."""
    pairs = [fresh_group([0, 1]), fresh_group([2, 3])]
    pair, rank = divmod(dist.get_rank(), 2)
    shard = VocabShard(*case.bounds[rank], case.vocab_size, pairs[pair])
    hidden, weight, bias = pair_problem(case, pair).tensors(torch.float64, slice(*case.bounds[rank]))
    loss = vocab_parallel_linear_cross_entropy(
        hidden, weight, case.target, shard, bias=bias, reduction=how, chunk_bytes=600, **case.options
    )
    (loss if how == "mean" else loss * upstream_for(case)).sum().backward()
    return {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad}


def pair_problem(case: Case, pair: int) -> Problem:
    problem = Problem(case, bias=True, seed=1 + pair)
    problem.hidden *= 1 + pair
    return problem


@pytest.mark.parametrize("how", ["mean", "none"])
def test_two_groups_side_by_side(how):
    """Sums over ranks (the mean row, the gradient of hidden states) stay within the shard's group."""
    case = build(2, label_smoothing=0.3)
    results = pool(4).run(in_pairs, case, how)
    for pair in (0, 1):
        leaves = pair_problem(case, pair).tensors(torch.float64)
        losses = dense_losses(F.linear(*leaves), case.target, case.vocab_size, **case.options)
        truth = losses.sum() / case.valid.sum() if how == "mean" else losses
        (truth if how == "mean" else truth * upstream_for(case)).sum().backward()
        got = joined(results[2 * pair : 2 * pair + 2])
        for name, leaf in zip(("hidden", "weight", "bias"), leaves, strict=True):
            torch.testing.assert_close(got[name], leaf.grad, rtol=0, atol=1e-12)
        torch.testing.assert_close(got["loss"], truth.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("how", ["mean", "none"])
def test_told_how_many_labels_there_are_it_does_the_same(name, how):
    case = CASES[name](2)
    if case.soft:
        pytest.skip("probabilities: every token has a label")
    told = pool(2).run(fused, case, reduction=how, label_tokens=int(case.valid.sum()))
    for rank, given in enumerate(pool(2).run(fused, case, reduction=how)):
        for key, value in given.items():
            assert value is None or torch.equal(told[rank][key], value)


# Wrong arguments: no rank waits.


def wrong_call(what: str, wrong_rank: int, later: bool):
    """The error of a call that one rank gets wrong, and the losses of correct calls before and after."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = fresh_group()
    shard = VocabShard.split(12, group)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 4, generator=generator)
    weight = torch.randn(12, 4, generator=generator)[shard.start : shard.stop].requires_grad_()
    target = torch.tensor([0, 11, -100, 5, 6])

    def correct():
        return vocab_parallel_linear_cross_entropy(hidden, weight, target, shard, label_smoothing=0.1).item()

    before = correct() if later else None
    given = {"hidden": hidden, "weight": weight, "target": target, "shard": shard, "label_smoothing": 0.1}
    if rank == wrong_rank:
        given |= WRONG[what][0](given)
    try:
        vocab_parallel_linear_cross_entropy(**given)
        outcome = ("no error", "")
    except Exception as error:
        outcome = (type(error).__name__, str(error))
    return *outcome, before, correct(), size


WRONG = {
    "smoothing": (lambda given: {"label_smoothing": 1.5}, r"label_smoothing.*1\.5"),
    "target": (lambda given: {"target": torch.tensor([0, 12, -100, 5, 6])}, r"target.*\[0, 12\).*12"),
    "target-shape": (lambda given: {"target": given["target"][:-1]}, r"target.*\(5,\).*\(4,\)"),
    "weight-width": (lambda given: {"weight": given["weight"].detach()[:, :-1]}, r"weight.*\[S, 4\].*3\)"),
    "weight-rows": (lambda given: {"weight": given["weight"].detach()[:-1]}, r"columns were expected"),
    "weight-missing": (lambda given: {"weight": None}, r"weight must be a tensor, got NoneType"),
    "hidden-a-number": (lambda given: {"hidden": torch.tensor(1.0)}, r"hidden must have at least one dimension"),
    "bias": (lambda given: {"bias": torch.zeros(1)}, r"bias.*\(1,\)"),
    "chunk-bytes": (lambda given: {"chunk_bytes": 0}, r"chunk_bytes.*0"),
    "int-weight": (lambda given: {"weight": given["weight"].detach().long()}, r"weight.*int64"),
    "bias-a-list": (lambda given: {"bias": [0.0] * len(given["weight"])}, r"bias must be a tensor, got list"),
    "float8-weight": (
        lambda given: {"weight": given["weight"].detach().to(torch.float8_e4m3fn)},
        r"weight must have a floating-point dtype \(float32.*float8",
    ),
    "num-items": (lambda given: {"num_items_in_batch": 3, "reduction": "sum"}, r"num_items_in_batch"),
    "num-items-text": (lambda given: {"num_items_in_batch": "3"}, r"num_items_in_batch.*'3'"),
    "num-items-nan": (lambda given: {"num_items_in_batch": torch.tensor(torch.nan)}, r"num_items_in_batch.*nan"),
    "num-items-negative": (lambda given: {"num_items_in_batch": -1}, r"num_items_in_batch.*-1"),
    "num-items-huge": (lambda given: {"num_items_in_batch": 2**70}, r"num_items_in_batch.*1180591620717411303424"),
    "num-items-infinite": (lambda given: {"num_items_in_batch": 1e30}, r"num_items_in_batch.*1e\+30"),
    "ignore-index-huge": (lambda given: {"ignore_index": 2**70}, r"ignore_index.*64 bits"),
    "bound-missing": (
        lambda given: {"shard": VocabShard(None, 6, 12, given["shard"].group)},
        r"takes integers.*None",
    ),
    "bound-huge": (lambda given: {"shard": VocabShard(0, 2**70, 12, given["shard"].group)}, r"stop < 2\^63"),
    "sparse-hidden": (lambda given: {"hidden": given["hidden"].to_sparse()}, r"hidden must be a dense tensor"),
    "sparse-target": (lambda given: {"target": given["target"].to_sparse()}, r"target must be a dense tensor"),
    "weight-elsewhere": (lambda given: {"weight": given["weight"].to("meta")}, r"weight must hold data"),
    "target-elsewhere": (lambda given: {"target": given["target"].to("meta")}, r"target must hold data"),
    "chunk-bytes-true": (lambda given: {"chunk_bytes": True}, r"chunk_bytes.*True"),
    "label-tokens": (lambda given: {"label_tokens": 3}, r"label_tokens.*number of labelled tokens, 4, got 3"),
    "label-tokens-many": (lambda given: {"label_tokens": 6}, r"label_tokens.*0 to 5.*6"),
    "label-tokens-text": (lambda given: {"label_tokens": "4"}, r"label_tokens.*'4'"),
    "label-tokens-true": (lambda given: {"label_tokens": True}, r"label_tokens.*True"),
    "label-tokens-soft": (
        lambda given: {"target": torch.full((5, len(given["weight"])), 1 / 12), "label_tokens": 5},
        r"label_tokens.*probabilities",
    ),
    "prior-with-gradient": (
        lambda given: {"smoothing_prior": torch.full((len(given["weight"]),), 1 / 12, requires_grad=True)},
        r"smoothing_prior gets no gradient.*detach",
    ),
    "soft-target-with-gradient": (
        lambda given: {"target": torch.full((5, len(given["weight"])), 1 / 12, requires_grad=True)},
        r"target gets no gradient.*detach",
    ),
    # what only shows beside the others: every rank's message
    "fewer-labels": (lambda given: {"target": torch.tensor([0, -100, -100, 5, 6])}, None),
    "other-labels": (lambda given: {"target": torch.tensor([0, 11, -100, 6, 5])}, None),
    "labels-elsewhere": (lambda given: {"target": torch.tensor([0, -100, 11, 5, 6])}, None),
    "other-items": (lambda given: {"num_items_in_batch": torch.tensor(3)}, None),
    "other-smoothing": (lambda given: {"label_smoothing": 0.2}, None),
    "other-budget": (lambda given: {"chunk_bytes": 100}, None),
    "frozen-here-only": (lambda given: {"weight": given["weight"].detach()}, None),
    "bf16-here-only": (
        lambda given: {"weight": given["weight"].bfloat16(), "hidden": given["hidden"].bfloat16()},
        None,
    ),
    "prior": (lambda given: {"smoothing_prior": torch.ones(len(given["weight"]))}, None),
    "negative-prior": (lambda given: {"smoothing_prior": torch.linspace(-0.1, 0.6, len(given["weight"]))}, None),
    "hidden-size": (lambda given: {"hidden": torch.ones(5, 3), "weight": torch.ones(len(given["weight"]), 3)}, None),
    "shards": (
        lambda given: {"shard": VocabShard(given["shard"].start, given["shard"].stop, 13, given["shard"].group)},
        None,
    ),
}


@pytest.mark.parametrize("later", [False, True], ids=["first-call", "later-call"])
@pytest.mark.parametrize("what", WRONG)
def test_wrong_on_one_rank_raises_on_every_rank(what, later):
    import re

    for wrong_rank in (0, 1):
        for rank, (error, message, before, after, _) in enumerate(pool(3).run(wrong_call, what, wrong_rank, later)):
            assert error == "ValueError", f"rank {rank}: {error} {message}"
            pattern = WRONG[what][1]
            if pattern is None:
                assert re.search("differ|sum to 1|same batch", message), message
            else:
                assert re.search(pattern if rank == wrong_rank else rf"rank\D*{wrong_rank}", message), message
            assert before is None or before == after
