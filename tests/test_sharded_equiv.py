"""The sharded loss and its gradient equal the three textbook formulations on the full logits.

Gloo ranks on the CPU; truth is fp64. In lower precision the error may be at most twice that of
`F.cross_entropy` on the same logits in the same precision, plus a few roundings of fp32: nothing is held to a
constant.
"""

import gc

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from smoothing import (
    TokenStats,
    VocabShard,
    smoothed_cross_entropy,
    vocab_parallel_cross_entropy,
)
from smoothing.kernels import torch_ops
from smoothing.reference import hf_label_smoother, onehot_cross_entropy, torch_cross_entropy
from tests.support.cases import CASES, EXAMPLE_LOGITS, EXAMPLE_TARGET, IGNORED, Case, build, dense_losses
from tests.support.ranks import Allocations, Collectives, fresh_group, pool

FORMULATIONS = [torch_cross_entropy, hf_label_smoother, onehot_cross_entropy]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The same examples every time; not shrunk, since one that hangs costs seconds at every step.
EXAMPLES = settings(
    max_examples=60,
    phases=[Phase.generate],
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


# What the ranks run.


def my_shard(case: Case, group=None) -> VocabShard:
    return VocabShard(*case.bounds[dist.get_rank()], case.vocab_size, group or dist.group.WORLD)


def sharded(case: Case, dtype=torch.float64, chunk=None, upstream=None, group=None, **more) -> dict:
    """Loss and gradient of this rank's share; `upstream` weighs the losses of reduction="none"."""
    logits, target, options = case.share(dist.get_rank(), dtype)
    before = logits.clone()
    logits.requires_grad_()
    whole_chunk = torch_ops.CHUNK_ELEMENTS
    torch_ops.CHUNK_ELEMENTS = chunk or whole_chunk
    try:
        loss = vocab_parallel_cross_entropy(logits, target, my_shard(case, group), **options, **more)
        (loss if upstream is None else loss * upstream.to(loss.dtype)).sum().backward()
    finally:
        torch_ops.CHUNK_ELEMENTS = whole_chunk
    same = torch.allclose(logits.detach(), before, rtol=0, atol=0, equal_nan=True)
    return {"loss": loss.detach(), "grad": logits.grad, "logits_unchanged": same}


def sharded_in_a_fresh_group(*args, **kwargs) -> dict:
    return sharded(*args, group=fresh_group(), **kwargs)


def many_sharded(calls: list[dict]) -> list[dict]:
    return [sharded(**call) for call in calls]


# What they are compared with.


def upstream_for(case: Case) -> torch.Tensor:
    """Upstream gradients that differ by row and are exact in every dtype."""
    return torch.tensor([1.0, -0.5, 2.0, 0.25]).repeat(len(case.target) // 4 + 1)[: len(case.target)]


def dense(case: Case, dtype, compute) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and gradient of `dense_losses`, on the logits as rounded to `dtype`, computed in `compute`."""
    logits = case.logits.to(dtype).to(compute).clone().requires_grad_()
    losses = dense_losses(logits, case.target, case.vocab_size, **case.options)
    (losses * upstream_for(case).to(compute)).sum().backward()
    return losses.detach(), logits.grad


def assert_at_most_twice_the_error(got, plain, truth, ulp, what):
    """max |got - truth| <= 2 max |plain - truth| + a few roundings. A NaN anywhere fails.

    One rounding of 1.0 is granted to differences that cancel (with one word, probability 1 less label 1).
    """
    if not truth.numel():
        return
    error = (got.double() - truth).abs().max()
    allowed = 2 * (plain.double() - truth).abs().max() + (8 * ulp * truth.abs().max()).clamp(min=ulp)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def assert_equals_dense(case: Case, results: list[dict], dtype):
    losses, grad = results[0]["loss"], torch.cat([r["grad"] for r in results], -1)
    assert all(torch.equal(r["loss"], losses) for r in results), "ranks hold different losses"
    assert all(r["logits_unchanged"] for r in results)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    truth_losses, truth_grad = dense(case, dtype, torch.float64)
    plain_losses, plain_grad = dense(case, dtype, dtype)
    ulp = torch.finfo(losses.dtype).eps
    assert losses.shape == truth_losses.shape
    assert_at_most_twice_the_error(losses, plain_losses, truth_losses, ulp, "loss")
    assert_at_most_twice_the_error(grad, plain_grad, truth_grad, ulp, "gradient")
    assert (losses[~case.valid] == 0).all() and (grad[~case.valid] == 0).all(), "an ignored row takes part"
    assert (grad[:, case.vocab_size :] == 0).all(), "padding takes part"


# Loss and gradient.


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_every_case_equals_dense_cross_entropy(ranks, name, dtype):
    case = CASES[name](ranks.size)
    results = ranks.run(sharded, case, dtype, None, upstream_for(case), reduction="none")
    assert_equals_dense(case, results, dtype)


@pytest.mark.parametrize("formulation", FORMULATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("pad", [0, 5])
def test_mean_equals_each_formulation(ranks, formulation, smoothing, pad):
    case = build(ranks.size, pad=pad, label_smoothing=smoothing)
    full = case.logits.clone().requires_grad_()
    truth = formulation(full[:, : case.vocab_size], case.target, smoothing)
    truth.backward()
    results = ranks.run(sharded, case)
    for result in results:
        torch.testing.assert_close(result["loss"], truth.detach(), rtol=1e-14, atol=0)
    grad = torch.cat([r["grad"] for r in results], -1)
    torch.testing.assert_close(grad, full.grad, rtol=0, atol=1e-15)


@pytest.mark.parametrize("smoothing, expected", [(0.0, 2.1185), (0.1, 2.1038), (1.0, 1.9713)])
def test_worked_example(ranks, smoothing, expected):
    bounds = VocabShard.bounds(5, ranks.size)
    case = Case(EXAMPLE_LOGITS, EXAMPLE_TARGET, 5, bounds, {"label_smoothing": smoothing})
    for result in ranks.run(sharded, case, torch.float32):
        assert result["loss"].item() == pytest.approx(expected, abs=5e-5)


@st.composite
def any_case(draw, ranks):
    vocab, pad = draw(st.integers(1, 30)), draw(st.integers(0, 6))
    width = vocab + pad
    cuts = sorted(draw(st.lists(st.integers(0, width), min_size=ranks - 1, max_size=ranks - 1)))
    optional = {
        "label_smoothing": st.sampled_from([0.1, 0.0, 1.0, 0.37]),
        "z_loss": st.sampled_from([0.0, 1e-2]),
        "logit_softcap": st.sampled_from([None, 5.0]),
    }
    case = build(
        ranks,
        seed=draw(st.integers(0, 2**32)),
        tokens=draw(st.integers(0, 9)),
        vocab=vocab,
        pad=pad,
        split=list(zip([0, *cuts], [*cuts, width], strict=True)),
        prior=draw(st.booleans()),
        soft=draw(st.booleans()),
        **{name: draw(values) for name, values in optional.items()},
    )
    if not case.soft:
        ignored = draw(st.lists(st.booleans(), min_size=len(case.target), max_size=len(case.target)))
        case.target[torch.tensor(ignored, dtype=torch.bool)] = IGNORED
    return case


def test_any_shape_and_split(ranks):
    """Shards of any width, none at all included, and chunks of any length."""

    @EXAMPLES
    @given(any_case(ranks.size), st.sampled_from(["fp64", "fp32", "bf16"]), st.sampled_from([None, 1, 40]))
    def check(case, dtype, chunk):
        upstream = upstream_for(case)
        results = ranks.run(sharded_in_a_fresh_group, case, DTYPES[dtype], chunk, upstream, reduction="none")
        assert_equals_dense(case, results, DTYPES[dtype])

    check()


@pytest.mark.parametrize("chunk", [1, 25, 100])
def test_chunks_change_nothing(ranks, chunk):
    """Chunks of one row, of a few, and with a rest, where each row matters (upstream gradients differ)."""
    names = ["padded", "prior", "soft", "z-loss", "softcap", "ignored-nan-inf", "no-token", "offset+1e4"]
    some = [CASES[name](ranks.size) for name in names]
    calls = [
        {
            "case": case,
            "dtype": torch.float32,
            "chunk": chunk,
            "upstream": upstream_for(case),
            "reduction": "none",
        }
        for case in some
    ]
    for case, *results in zip(some, *ranks.run(many_sharded, calls), strict=True):
        assert_equals_dense(case, results, torch.float32)


# Reductions.

REDUCTIONS = {
    "mean": ({}, lambda losses, valid: losses.sum() / valid),
    "sum": ({"reduction": "sum"}, lambda losses, valid: losses.sum()),
    "none": ({"reduction": "none"}, lambda losses, valid: losses),
    "mean-by-int": ({"num_items_in_batch": 29}, lambda losses, valid: losses.sum() / 29),
    "mean-by-tensor": ({"num_items_in_batch": torch.tensor(29)}, lambda losses, valid: losses.sum() / 29),
}


@pytest.mark.parametrize("name", ["padded", "soft-smoothing", "softcap-z-loss-prior-padded", "one-valid"])
@pytest.mark.parametrize("how", REDUCTIONS)
def test_reductions(ranks, how, name):
    case = CASES[name](ranks.size)
    options, reduce = REDUCTIONS[how]
    logits = case.logits.clone().requires_grad_()
    truth = reduce(dense_losses(logits, case.target, case.vocab_size, **case.options), case.valid.sum())
    truth.sum().backward()
    results = ranks.run(sharded, case, **options)
    for result in results:
        torch.testing.assert_close(result["loss"], truth.detach(), rtol=1e-14, atol=0)
    grad = torch.cat([r["grad"] for r in results], -1)
    torch.testing.assert_close(grad, logits.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("how", REDUCTIONS)
@pytest.mark.parametrize("name", ["all-ignored", "no-token"])
def test_no_valid_target_gives_zero_still_on_the_graph(ranks, name, how):
    options, _ = REDUCTIONS[how]
    for result in ranks.run(sharded, CASES[name](ranks.size), torch.float32, **options):
        assert (result["loss"] == 0).all()  # backward has run in the worker: the graph is there
        assert (result["grad"] == 0).all()


# Statistics.


def statistics(case: Case, dtype=torch.float64, leading=()):
    logits, target, options = case.share(dist.get_rank(), dtype)
    logits, target = (x.reshape(*leading, -1, *x.shape[1:]) for x in (logits, target))
    logits.requires_grad_()
    loss, stats = vocab_parallel_cross_entropy(logits, target, my_shard(case), return_stats=True, **options)
    fields = {name: getattr(stats, name) for name in ("nll", "lse", "confidence", "correct", "valid")}
    attached = [name for name, value in fields.items() if value is not None and value.requires_grad]
    return loss.detach(), fields, isinstance(stats, TokenStats), attached


@pytest.mark.parametrize("leading", [(), (2,)], ids=["flat", "batched"])
@pytest.mark.parametrize(
    "name", ["padded", "ties", "softcap-z-loss-prior-padded", "ignored-nan-inf", "offset+1e4", "all-ignored"]
)
def test_statistics(ranks, name, leading):
    case = CASES[name](ranks.size)
    z = case.logits[:, : case.vocab_size].nan_to_num(0, 0, 0)
    if cap := case.options.get("logit_softcap"):
        z = cap * torch.tanh(z / cap)
    at_target = z.gather(-1, case.target.clamp(min=0)[:, None]).squeeze(-1)
    expected = {
        "nll": z.logsumexp(-1) - at_target,
        "lse": z.logsumexp(-1),
        "confidence": z.softmax(-1).amax(-1),
        "correct": z.argmax(-1) == case.target,
        "valid": case.valid,
    }
    for loss, fields, right_type, attached in ranks.run(statistics, case, torch.float64, leading):
        assert right_type and not attached
        plain_loss = dense_losses(case.logits, case.target, case.vocab_size, **case.options).sum()
        torch.testing.assert_close(loss, plain_loss / max(case.valid.sum(), 1), rtol=1e-13, atol=0)
        for field, value in expected.items():
            value = torch.where(case.valid, value, torch.zeros_like(value)).reshape(fields["valid"].shape)
            assert fields[field].shape == (*leading, len(case.target) // (2 if leading else 1)), field
            torch.testing.assert_close(
                fields[field], value, rtol=1e-12, atol=1e-12, msg=lambda m, f=field: f"{f}: {m}"
            )


@pytest.mark.parametrize("name", ["soft-unequal-masses", "soft-prior-padded"])
def test_statistics_of_probabilities(ranks, name):
    """The unsmoothed loss of rows that sum to 1, or to another mass: 0.5, 2, 0."""
    case = CASES[name](ranks.size)
    truth = dense_losses(case.logits, case.target, case.vocab_size)
    for _, fields, _, _ in ranks.run(statistics, case):
        assert fields["correct"] is None and fields["valid"].all()
        torch.testing.assert_close(fields["nll"], truth, rtol=1e-12, atol=1e-12)


# The tensors it is given.


def laid_out(case: Case, layout: str):
    logits, target, options = case.share(dist.get_rank(), torch.float32)
    if layout == "columns-of-a-wider-tensor":
        wide = torch.full((len(logits), logits.shape[1] + 3), torch.nan)
        wide[:, 1:-2] = logits
        logits = wide[:, 1:-2]
    elif layout == "transposed":
        logits = logits.t().contiguous().t()
    elif layout == "batched":
        logits, target = logits.reshape(2, -1, logits.shape[-1]), target.reshape(2, -1)
    elif layout == "shifted-batch":  # what a causal LM does: all but the last position
        three = logits.reshape(2, -1, logits.shape[-1])
        logits = torch.cat([three, torch.full_like(three[:, :1], torch.nan)], 1)[:, :-1]
        target = target.reshape(2, -1)
    elif layout == "expanded":
        logits, target = logits[:1].expand(4, -1), target[:4]
    logits = logits.detach().requires_grad_()
    loss = vocab_parallel_cross_entropy(logits, target, my_shard(case), reduction="none", **options)
    assert loss.shape == target.shape
    loss.sum().backward()
    return {"loss": loss.detach().flatten(), "grad": logits.grad.reshape(-1, logits.shape[-1])}


@pytest.mark.parametrize(
    "layout", ["columns-of-a-wider-tensor", "transposed", "batched", "shifted-batch", "expanded"]
)
def test_layouts_of_logits(ranks, layout):
    case = CASES["padded"](ranks.size)
    if layout == "expanded":
        case.logits[1:4] = case.logits[0]
    plain = ranks.run(laid_out, case, "contiguous")
    rows = 4 if layout == "expanded" else len(case.target)
    for result, expected in zip(ranks.run(laid_out, case, layout), plain, strict=True):
        torch.testing.assert_close(result["loss"], expected["loss"][:rows], rtol=1e-6, atol=0)
        torch.testing.assert_close(result["grad"], expected["grad"][:rows], rtol=0, atol=1e-6)


def changed_in_place(case: Case):
    """`inplace_backward=True`: gradient of the leaf, is it where the logits are, a second backward's error."""
    values, target, options = case.share(dist.get_rank(), torch.float32)
    leaf = values.requires_grad_()
    logits = leaf * 1.0
    where = []
    logits.register_hook(lambda grad: where.append(grad.data_ptr()))
    loss = vocab_parallel_cross_entropy(logits, target, my_shard(case), inplace_backward=True, **options)
    loss.backward(retain_graph=True)
    grad = leaf.grad.clone()
    try:
        loss.backward()
        second = None
    except RuntimeError as error:
        second = str(error)
    return {"loss": loss.detach(), "grad": grad, "in_place": where[0] == logits.data_ptr(), "second": second}


@pytest.mark.parametrize("name", ["padded", "softcap-z-loss-prior-padded", "soft-smoothing", "ignored-nan-inf"])
def test_inplace_backward(ranks, name):
    case = CASES[name](ranks.size)
    plain = ranks.run(sharded, case, torch.float32)
    for result, expected in zip(ranks.run(changed_in_place, case), plain, strict=True):
        assert torch.equal(result["loss"], expected["loss"])
        assert torch.equal(result["grad"], expected["grad"])
        assert result["in_place"]
        assert result["second"], "a second backward over the overwritten logits went through"


# Backward, more than once.


def backward_twice(case: Case):
    logits, target, options = case.share(dist.get_rank(), torch.float32)
    logits.requires_grad_()
    loss = vocab_parallel_cross_entropy(logits, target, my_shard(case), **options)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits, 3 * torch.ones_like(loss))
    return first, second


def test_second_backward_through_a_retained_graph(ranks):
    case = build(ranks.size, pad=2, label_smoothing=0.1, z_loss=1e-2)
    for first, second in ranks.run(backward_twice, case):
        assert first.abs().max() > 0
        torch.testing.assert_close(second, 3 * first, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
def test_double_backward_is_refused(soft):
    case = build(1, soft=soft, label_smoothing=0.1)
    logits = case.logits.requires_grad_()
    loss = smoothed_cross_entropy(logits, case.target, label_smoothing=0.1)
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        grad.square().sum().backward()


@pytest.mark.parametrize(
    "name",
    ["smoothing-0.1", "prior", "soft-softcap-z-loss", "z-loss", "softcap", "softcap-z-loss-prior-padded"],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(name, reduction):
    case = CASES[name](1)
    case.logits[:, case.vocab_size :] = 0
    shard = VocabShard(*case.bounds[0], case.vocab_size)

    def loss(logits):
        return vocab_parallel_cross_entropy(logits, case.target, shard, reduction=reduction, **case.options)

    assert torch.autograd.gradcheck(loss, case.logits.requires_grad_())


@pytest.mark.parametrize("edited", ["target", "prior", "soft-target", "logits"])
def test_what_was_changed_before_backward_is_noticed(edited):
    case = build(1, tokens=6, prior=True, label_smoothing=0.1, soft=edited == "soft-target")
    case.logits.requires_grad_()
    loss = vocab_parallel_cross_entropy(case.logits, case.target, **case.options)
    changed = {"prior": case.options["smoothing_prior"], "logits": case.logits}.get(edited, case.target)
    with torch.no_grad():
        changed.zero_()
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_one_device_function_is_the_same_loss():
    case = build(1, label_smoothing=0.1, z_loss=1e-2, prior=True)
    loss = smoothed_cross_entropy(case.logits, case.target, **case.options)
    assert torch.equal(loss, vocab_parallel_cross_entropy(case.logits, case.target, **case.options))
    truth = dense_losses(case.logits, case.target, case.vocab_size, **case.options).sum() / case.valid.sum()
    torch.testing.assert_close(loss, truth, rtol=1e-14, atol=0)


# What it costs.


def collectives(case: Case, dtype):
    """Collectives (operation, bytes sent) of the first call's forward, a later one's, and both backwards."""
    logits, target, options = case.share(dist.get_rank(), dtype)
    logits.requires_grad_()
    shard = my_shard(case, fresh_group())
    seen = []
    for _ in range(2):
        with Collectives() as forward:
            loss, _ = vocab_parallel_cross_entropy(logits, target, shard, return_stats=True, **options)
        with Collectives() as backward:
            loss.backward()
        seen += [forward.seen, backward.seen]
    return seen[0], seen[2], seen[1] + seen[3]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["smoothing-0.1", "softcap-z-loss-prior-padded", "soft-smoothing", "all-ignored"])
@pytest.mark.parametrize("dtype, width", [(torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)], ids=str)
def test_one_collective_of_four_numbers_a_token(size, name, dtype, width):
    case = CASES[name](size)
    number = 5 if case.soft else 4  # a distribution's mass is a fifth
    for first, later, backward in pool(size).run(collectives, case, dtype):
        assert len(first) >= 1
        assert backward == []
        assert [sent for _, sent in later] == [width * number * len(case.target) + 72], later


def kept(case: Case, dtype):
    """Bytes kept for backward beside logits and target; and the storages made by forward and by backward."""
    logits, target, options = case.share(dist.get_rank(), dtype)
    logits.requires_grad_()
    shard = my_shard(case)
    vocab_parallel_cross_entropy(logits, target, shard, **options)  # agrees on the bounds
    given = {logits.untyped_storage().data_ptr(), target.untyped_storage().data_ptr()}
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    chunk, torch_ops.CHUNK_ELEMENTS = torch_ops.CHUNK_ELEMENTS, 1024
    try:
        gc.collect()
        old = {id(o) for o in gc.get_objects()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), Allocations() as forward:
            loss = vocab_parallel_cross_entropy(logits, target, shard, **options)
        gc.collect()
        for thing in gc.get_objects():  # what hangs on the graph without having been declared
            if id(thing) not in old and isinstance(thing, torch.Tensor):
                note(thing)
        with Allocations() as backward:
            loss.backward()
    finally:
        torch_ops.CHUNK_ELEMENTS = chunk
    return sum(n for where, n in saved.items() if where not in given), forward.bytes, backward.bytes


@pytest.mark.parametrize("name", ["labels", "soft"])
def test_memory_is_linear_in_tokens(name):
    """Nothing of the size of the logits is kept or made, but their gradient in their own dtype."""
    tokens, size = 64, 2
    case = build(size, tokens=tokens, vocab=1024, pad=8, soft=name == "soft", label_smoothing=0.1, z_loss=1e-3)
    for rank, (saved, forward, backward) in enumerate(pool(size).run(kept, case, torch.bfloat16)):
        columns = case.bounds[rank][1] - case.bounds[rank][0]
        assert saved <= 64 * tokens
        assert max(forward) <= 4 * 2 * 1024 + 64 * tokens
        large = [n for n in backward if n > 4 * 2 * 1024 + 64 * tokens]
        assert large == [tokens * columns * 2], "more than the gradient itself"


# Several losses in one process.


def two_heads_that_share_a_shard(size):
    """Two vocabularies cut differently: the first rank's columns are the same in both."""
    group = fresh_group()
    losses = []
    for bounds in ([(0, 4), (4, 7), (7, 12)], [(0, 4), (4, 9), (9, 12)], [(0, 4), (4, 7), (7, 12)]):
        case = build(size, vocab=12, split=bounds, label_smoothing=0.1)
        logits, target, options = case.share(dist.get_rank(), torch.float64)
        losses.append(vocab_parallel_cross_entropy(logits, target, my_shard(case, group), **options))
    return torch.stack(losses)


def test_another_split_that_only_some_ranks_can_see():
    results = pool(3).run(two_heads_that_share_a_shard, 3)
    for losses in results:
        torch.testing.assert_close(losses, losses[:1].expand(3), rtol=1e-14, atol=0)


def halves(case: Case):
    """Ranks 0,1 and ranks 2,3 work apart, each pair on the whole vocabulary."""
    pairs = [fresh_group([0, 1]), fresh_group([2, 3])]
    pair, rank = divmod(dist.get_rank(), 2)
    logits, target, options = case.share(rank, torch.float64)
    shard = VocabShard(*case.bounds[rank], case.vocab_size, pairs[pair])
    logits = logits + pair * torch.arange(len(logits))[:, None]
    loss = vocab_parallel_cross_entropy(logits, target, shard, z_loss=1e-3 * pair, **options)
    return (shard.rank, shard.world_size), loss


def test_two_groups_side_by_side():
    case = CASES["padded"](2)
    results = pool(4).run(halves, case)
    assert [place for place, _ in results] == [(0, 2), (1, 2)] * 2
    for (_, loss), pair in zip(results, [0, 0, 1, 1], strict=True):
        logits = case.logits + pair * torch.arange(len(case.logits))[:, None]
        truth = dense_losses(logits, case.target, case.vocab_size, z_loss=1e-3 * pair, **case.options)
        torch.testing.assert_close(loss, truth.sum() / case.valid.sum(), rtol=1e-13, atol=0)
