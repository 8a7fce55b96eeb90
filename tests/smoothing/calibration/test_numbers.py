"""The numbers of a token, sharded, from logits and from hidden states: against full logits in fp64."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from smoothing import VocabShard, linear_token_numbers, token_numbers, unsmooth
from tests.support.ranks import pool

NAMES = ("nll", "confidence", "correct", "entropy", "sum_square", "nll_at", "confidence_at")
TEMPERATURES = (0.5, 1.0, 1.7)
HIDDEN = 5


def bounds(cuts: list[int], padding: int, vocab: int) -> list[tuple[int, int]]:
    edges = [0, *sorted(cuts), vocab + padding]
    return list(pairwise(edges))


def numbers_of(logits, target, temperatures) -> dict:
    """The definitions, of full logits."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    label = target.clamp(min=0).unsqueeze(-1)
    at = [(logits / t).log_softmax(-1) for t in temperatures]
    return {
        "nll": -log_p.gather(-1, label).squeeze(-1),
        "confidence": p.amax(-1),
        "correct": (logits.argmax(-1) == target).to(p.dtype),
        "entropy": -torch.where(p > 0, p * log_p, 0.0).sum(-1),
        "sum_square": p.square().sum(-1),
        "nll_at": torch.stack([-q.gather(-1, label).squeeze(-1) for q in at], -1),
        "confidence_at": torch.stack([q.exp().amax(-1) for q in at], -1),
    }


def expected(logits, target, options: dict) -> tuple[dict, dict]:
    """Of a model as it is and unsmoothed, 0 where there is no label."""
    z = logits.double()
    if cap := options.get("logit_softcap"):
        z = cap * (z / cap).tanh()
    z = z / options.get("temperature", 1.0)
    epsilon, floor = options["unsmooth"], 0.01
    prior = options.get("smoothing_prior")
    u = z.new_full(z.shape[1:], 1 / z.shape[1]) if prior is None else prior.double()
    w = torch.maximum((z.softmax(-1) - epsilon * u) / (1 - epsilon), floor * u)
    both = []
    for scores in (z, w.log()):
        numbers = numbers_of(scores, target, options["temperatures"])
        keep = target != -100
        both.append({name: x * keep.view(-1, *[1] * (x.dim() - 1)) for name, x in numbers.items()})
    return tuple(both)


def on_a_rank(logits, hidden, weight, target, cuts, padding, options) -> tuple:
    """This rank's share of both inputs, padding filled with what would win if it were looked at."""
    vocab, world = logits.shape[1], dist.get_world_size()
    start, stop = bounds(cuts, padding, vocab)[dist.get_rank()]
    shard = VocabShard(start, stop, vocab, dist.group.WORLD if world > 1 else None)
    own = (
        {}
        if (u := options.get("smoothing_prior")) is None
        else {"smoothing_prior": F.pad(u, (0, padding))[start:stop]}
    )
    share = F.pad(logits, (0, padding), value=99.0)[:, start:stop]
    rows = F.pad(weight, (0, 0, 0, padding), value=99.0)[start:stop]
    first = token_numbers(share, target, shard, **options | own)
    second = linear_token_numbers(hidden, rows, target, shard, chunk_bytes=500, **options | own)
    return [{**numbers._asdict(), "unsmoothed": numbers.unsmoothed._asdict()} for numbers in (first, second)]


@st.composite
def cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    world, vocab, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(0, 9))
    weight = torch.randn(vocab, HIDDEN, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.3, 3.0]))
    hidden = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    logits = hidden @ weight.T
    if draw(st.booleans()):
        logits = logits.round()  # ties
    if draw(st.booleans()):
        logits = logits + 1e4
    target = torch.randint(0, vocab, (tokens,), generator=generator)
    target[torch.rand(tokens, generator=generator) < 0.3] = -100
    padding = draw(st.integers(0, 4))
    cuts = draw(st.lists(st.integers(0, vocab + padding), min_size=world - 1, max_size=world - 1))
    options = {"unsmooth": draw(st.sampled_from([0.1, 0.5])), "temperatures": TEMPERATURES}
    if draw(st.booleans()):
        options["logit_softcap"] = 2.5
    if draw(st.booleans()):
        options["temperature"] = 1.3
    if draw(st.booleans()):
        options["smoothing_prior"] = torch.rand(vocab, generator=generator, dtype=torch.float64).softmax(0)
    return world, logits, hidden, weight, target, cuts, padding, options


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(cases())
def test_sharded_numbers_are_those_of_full_logits(case):
    world, logits, hidden, weight, target, cuts, padding, options = case
    wanted = expected(logits, target, options), expected(hidden @ weight.T, target, options)
    answers = pool(world).run(on_a_rank, logits, hidden, weight, target, cuts, padding, options)
    for answer in answers:
        for (plain, unsmoothed), got in zip(wanted, answer, strict=True):
            for name in NAMES:
                offset = max(1.0, logits.abs().max().item() * 1e-2) if logits.numel() else 1.0
                torch.testing.assert_close(got[name], plain[name], rtol=1e-12, atol=1e-12 * offset)
                torch.testing.assert_close(got["unsmoothed"][name], unsmoothed[name], rtol=1e-11, atol=1e-11 * offset)
            assert torch.equal(got["valid"], target != -100)
    for other in answers[1:]:
        assert all(torch.equal(other[0][name], answers[0][0][name]) for name in NAMES)


@pytest.mark.parametrize("spread", [1.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp32_errs_at_most_twice_as_much_as_the_plain_method(dtype, spread):
    torch.manual_seed(0)
    logits = (torch.randn(64, 3001) * spread).to(dtype)
    target = torch.randint(0, 3001, (64,))
    options = {"unsmooth": 0.1, "temperatures": TEMPERATURES}
    truth, _ = expected(logits, target, options)
    plain = numbers_of(logits.float(), target, TEMPERATURES)
    got = token_numbers(logits, target, **options)
    for name in NAMES:
        error = (getattr(got, name).double() - truth[name]).abs().max()
        assert error <= 2 * (plain[name].double() - truth[name]).abs().max() + 4e-6 * truth[name].abs().max()


def test_of_several_largest_logits_the_first_is_the_model_s_guess():
    logits = torch.tensor([[2.0, 1.0, 2.0, 2.0], [0.0, 3.0, 1.0, 1.0], [5.0, 5.0, 0.0, 0.0], [1.0, 4.0, 4.0, 4.0]])
    correct = token_numbers(logits, torch.tensor([3, 1, 2, 1])).correct
    assert torch.equal(correct, torch.tensor([0.0, 1.0, 0.0, 1.0]))


@pytest.mark.parametrize("prior", [None, "given"])
def test_unsmoothing_gives_back_what_was_smoothed(prior):
    torch.manual_seed(0)
    p = (torch.randn(7, 50, dtype=torch.float64) * 2).softmax(-1)
    u = torch.full((50,), 1 / 50, dtype=torch.float64) if prior is None else torch.rand(50).double().softmax(0)
    p = p.clamp(min=0.02 * u)  # above the floor
    p = p / p.sum(-1, keepdim=True)
    smoothed = 0.9 * p + 0.1 * u
    back = unsmooth(smoothed.log(), 0.1, prior=None if prior is None else u)
    torch.testing.assert_close(back.exp(), p, rtol=1e-12, atol=0)
    in_fp32 = unsmooth(smoothed.log().float(), 0.1, prior=None if prior is None else u)
    assert (in_fp32.exp().double() - p).abs().max() < 1e-6


def test_what_is_below_the_smoothing_is_floored():
    p = torch.tensor([0.98, 0.01, 0.01, 0.0], dtype=torch.float64)
    back = unsmooth(p.log(), 0.4, floor=0.5).exp()
    kept = torch.tensor([(0.98 - 0.1) / 0.6, 0.125, 0.125, 0.125], dtype=torch.float64)
    torch.testing.assert_close(back, kept / kept.sum())


def refused(logits, target, options) -> None:
    shard = VocabShard.split(8, dist.group.WORLD)
    if dist.get_rank() == 1:
        options = options | {"temperatures": (0.0,)}
    token_numbers(logits[:, shard.start : shard.stop], target, shard, **options)


def test_ranks_fail_together():
    outcomes = pool(2).attempt(refused, torch.randn(3, 8), torch.tensor([1, 2, 3]), {"temperatures": (1.0,)})
    assert [outcome.error for outcome in outcomes] == ["ValueError", "ValueError"]
    assert "temperature" in outcomes[1].message and "rank 1" in outcomes[0].message
