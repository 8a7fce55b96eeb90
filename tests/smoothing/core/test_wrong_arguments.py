"""Wrong arguments on one rank: every rank of the group ends with an error, and none waits.

Each mistake is made by one rank while the others call correctly. The rank that errs must say what was
expected and what came; the others must name it, or the disagreement. Afterwards the group still works.

A shard is kept for all calls of a group, as training keeps it: only then is a later call without a handshake.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from smoothing import (
    VocabShard,
    smoothed_cross_entropy,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from smoothing.core.options import LossOptions
from tests.support.ranks import fresh_group, pool

VOCAB = 12
TOKENS = 5


@dataclass
class Call:
    """One rank's arguments."""

    logits: torch.Tensor
    target: torch.Tensor
    bounds: tuple[int, int]
    vocab_size: int
    options: dict

    @property
    def width(self) -> int:
        return self.logits.shape[-1]

    def loss(self, shard_of: Callable[[tuple[int, int], int], VocabShard]):
        shard = shard_of(self.bounds, self.vocab_size)
        return vocab_parallel_cross_entropy(self.logits, self.target, shard, **self.options)


def kept_shards(group) -> Callable[[tuple[int, int], int], VocabShard]:
    """Shards of this group by `(bounds, vocab_size)`: the same object for the same numbers."""
    return functools.cache(lambda bounds, vocab_size: VocabShard(*bounds, vocab_size, group))


def correct_call(rank: int, size: int, kind: str = "") -> Call:
    """One rank's part of a correct call. `kind`: "prior", "soft" or "double", else labels and fp32 logits."""
    start, stop = VocabShard.bounds(VOCAB, size)[rank]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, VOCAB, generator=generator)[:, start:stop]
    target, options = torch.tensor([0, 11, -100, 5, 6]), {"label_smoothing": 0.1}
    if kind == "prior":  # the uniform one, written out
        options["smoothing_prior"] = torch.full((stop - start,), 1 / VOCAB)
    elif kind == "soft":  # of three dimensions, so that the first is not the number of tokens
        logits = logits.unsqueeze(0)
        target = torch.full_like(logits, 1 / VOCAB)
    elif kind == "double":
        logits = logits.double()
    return Call(logits.requires_grad_(), target, (start, stop), VOCAB, options)


def kind_of(name: str) -> str:
    """The kind of correct call beside which a mistake of this name is made."""
    return name.partition("-")[0]


def with_options(**options):
    return lambda call: replace(call, options=call.options | options)


def with_target(change):
    return lambda call: replace(call, target=change(call.target))


def with_labels(*labels):
    return with_target(lambda target: torch.tensor(labels))


def with_prior(prior_of):
    return lambda call: replace(call, options=call.options | {"smoothing_prior": prior_of(call)})


def with_tokens(number):
    return lambda call: replace(call, logits=call.logits.detach()[:number], target=call.target[:number])


def wider_shard(start_by, stop_by):
    """Bounds moved, and logits that fit them, so that only the other ranks' bounds contradict."""

    def change(call):
        start, stop = max(0, call.bounds[0] + start_by), call.bounds[1] + stop_by
        return replace(call, bounds=(start, stop), logits=torch.randn(TOKENS, stop - start))

    return change


def ignoring_other_labels(call):
    target = torch.where(call.target == -100, -7, call.target)
    return replace(call, target=target, options=call.options | {"ignore_index": -7})


# What the rank itself can tell: (what it does, what its own error must contain).
MISTAKES = {
    "logits-missing": (lambda call: replace(call, logits=None), r"logits must be a tensor, got NoneType"),
    "logits-a-number": (lambda call: replace(call, logits=torch.tensor(1.0)), r"logits.*at least one dimension"),
    "smoothing-above-1": (with_options(label_smoothing=1.5), r"label_smoothing.*\[0, 1\].*1\.5"),
    "smoothing-negative": (with_options(label_smoothing=-0.1), r"label_smoothing.*\[0, 1\].*-0\.1"),
    "smoothing-nan": (with_options(label_smoothing=float("nan")), r"label_smoothing.*\[0, 1\].*nan"),
    "reduction": (with_options(reduction="average"), r"reduction.*mean.*sum.*none.*average"),
    "num-items-with-sum": (
        with_options(reduction="sum", num_items_in_batch=4),
        r"num_items_in_batch.*mean.*sum",
    ),
    "z-loss-nan": (with_options(z_loss=float("nan")), r"z_loss.*nan"),
    "softcap-zero": (with_options(logit_softcap=0.0), r"logit_softcap.*0\.0"),
    "target-too-large": (with_labels(0, 12, -100, 5, 6), r"target.*\[0, 12\).*12"),
    "target-negative": (with_labels(0, -5, -100, 5, 6), r"target.*\[0, 12\).*-5"),
    "target-int32": (with_target(lambda target: target.int()), r"target.*int64.*int32"),
    "target-bool": (with_target(lambda target: target > 0), r"target.*int64.*bool"),
    "target-shape": (with_target(lambda target: target[:-1]), r"target.*\(5,\).*\(4,\)"),
    "soft-target-shape": (
        with_target(lambda target: torch.ones(1, TOKENS, VOCAB + 1)),
        r"\(1, 5, \d+\).*\(1, 5, 13\)",
    ),
    "soft-smoothing": (with_options(label_smoothing=1.5), r"label_smoothing.*1\.5"),
    "soft-logits-missing": (lambda call: replace(call, logits=None), r"logits must be a tensor, got NoneType"),
    "double-smoothing": (with_options(label_smoothing=1.5), r"label_smoothing.*1\.5"),
    "width": (lambda call: replace(call, logits=call.logits.detach()[:, :-1]), r"\d+.*expected.*got \d+"),
    "logits-int": (lambda call: replace(call, logits=call.logits.detach().long()), r"dtype.*float32.*int64"),
    "num-items-text": (with_options(num_items_in_batch="4"), r"num_items_in_batch.*'4'"),
    "soft-target-with-gradient": (
        with_target(lambda target: target.clone().requires_grad_()),
        r"target gets no gradient.*detach",
    ),
    "ignore-index-huge": (with_options(ignore_index=2**70), r"ignore_index.*64 bits"),
    "ignore-index-bool": (with_options(ignore_index=True), r"ignore_index.*64 bits.*True"),
    "ignore-index-float": (with_options(ignore_index=-100.0), r"ignore_index.*64 bits.*-100\.0"),
    "num-items-huge": (with_options(num_items_in_batch=2**70), r"num_items_in_batch.*1180591620717411303424"),
    "bound-missing": (lambda call: replace(call, bounds=(None, call.bounds[1])), r"takes integers.*None"),
    "logits-sparse": (lambda call: replace(call, logits=call.logits.detach().to_sparse()), r"logits must be a dense"),
    "target-elsewhere": (with_target(lambda target: target.to("meta")), r"target must hold data"),
    "prior-elsewhere": (
        with_prior(lambda call: torch.ones(call.width, device="meta")),
        r"smoothing_prior must hold data",
    ),
    "prior-length": (
        with_prior(lambda call: torch.full((call.width + 1,), 1 / VOCAB)),
        r"smoothing_prior.*\(\d+,\)",
    ),
}

# What only shows beside the other ranks: (what one rank does, what every rank's error must contain).
DISAGREEMENTS = {
    "gap": (wider_shard(1, -1), r"gap|overlap|cover"),
    "overlap": (wider_shard(-1, 1), r"gap|overlap|cover"),
    "vocab-size": (lambda call: replace(call, vocab_size=VOCAB + 1), r"vocab_size.*1[23].*1[23]"),
    "tokens": (with_tokens(3), r"tokens.*[35].*[35]"),
    "smoothing": (with_options(label_smoothing=0.2), r"label_smoothing.*0\.[12].*0\.[12]"),
    "ignore-index": (ignoring_other_labels, r"differ"),
    "labels": (with_labels(0, 11, -100, 5, 7), r"same batch"),
    "labels-swapped": (with_labels(0, 11, -100, 6, 5), r"same batch"),
    "labels-shifted": (with_labels(0, -100, 11, 5, 6), r"same batch"),
    "items-in-batch": (with_options(num_items_in_batch=7), r"same batch"),
    "reduction": (with_options(reduction="sum"), r"differ"),
    "z-loss": (with_options(z_loss=0.5), r"differ"),
    "softcap": (with_options(logit_softcap=5.0), r"differ"),
    "dtype": (lambda call: replace(call, logits=call.logits.detach().bfloat16()), r"differ"),
    "target-soft": (
        lambda call: replace(call, target=torch.full((TOKENS, call.width), 1 / VOCAB)),
        r"differ",
    ),
    "prior-none": (with_prior(lambda call: None), r"differ"),
    "prior-sum": (with_prior(lambda call: torch.full((call.width,), 1.0)), r"smoothing_prior.*sum to 1"),
    "prior-negative": (
        with_prior(lambda call: torch.full((call.width,), 1 / VOCAB).index_fill_(0, torch.tensor([0, 1]), -1e-7)),
        r"smoothing_prior.*negative",
    ),
    "prior-nan": (
        with_prior(lambda call: torch.full((call.width,), torch.nan)),
        r"smoothing_prior.*sum to 1.*nan",
    ),
}

# These change how much is sent, or whether the ranks must meet again. At a later call, where nothing but the
# loss's own collective tells the ranks of each other, the backend may end the processes.
OUT_OF_STEP = ["tokens", "gap", "overlap", "vocab-size", "target-soft"]
OUT_OF_STEP_MISTAKES = ["bound-missing"]  # another shard, hence a handshake that the other ranks do not start
WHO = [(2, 0), (2, 1), (3, 1)]  # (ranks, the one that errs)


def attempt_call(call: Call, shard_of):
    try:
        call.loss(shard_of)
    except Exception as error:
        return type(error).__name__, str(error)
    return "no error", ""


def err(table: str, name: str, wrong_rank: int, later: bool):
    """[correct,] wrong, correct on one new group: the wrong call's error, the losses of the correct ones."""
    rank, group = dist.get_rank(), fresh_group()
    shard_of = kept_shards(group)
    correct = correct_call(rank, dist.get_world_size(), kind_of(name))
    wrong = globals()[table][name][0](correct) if rank == wrong_rank else correct
    before = correct.loss(shard_of).item() if later else None
    outcome = attempt_call(wrong, shard_of)
    after = correct.loss(shard_of).item()
    return *outcome, before, after


def truth(name: str):
    call = correct_call(0, 1, kind_of(name))
    target = call.target.flatten(0, -2) if call.target.is_floating_point() else call.target
    return torch.nn.functional.cross_entropy(call.logits.flatten(0, -2), target, label_smoothing=0.1).item()


FIRST = [pytest.param(name, False, id=f"{name}-first-call") for name in MISTAKES]
LATER = [pytest.param(name, True, id=f"{name}-later-call") for name in MISTAKES if name not in OUT_OF_STEP_MISTAKES]


@pytest.mark.parametrize("size, wrong_rank", WHO, ids="{}".format)
@pytest.mark.parametrize("name, later", FIRST + LATER)
def test_mistake_of_one_rank(name, size, wrong_rank, later):
    results = pool(size).run(err, "MISTAKES", name, wrong_rank, later)
    for rank, (error, message, before, after) in enumerate(results):
        assert error == "ValueError", f"rank {rank}: {error} {message}"
        expected = MISTAKES[name][1] if rank == wrong_rank else rf"rank\D*{wrong_rank}"
        assert re.search(expected, message, re.S), f"rank {rank}: {message}"
        assert after == pytest.approx(truth(name), rel=1e-6)
        assert before is None or before == after


@pytest.mark.parametrize("size, wrong_rank", WHO, ids="{}".format)
@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_disagree_at_their_first_call(name, size, wrong_rank):
    for rank, (error, message, _, after) in enumerate(
        pool(size).run(err, "DISAGREEMENTS", name, wrong_rank, later=False)
    ):
        assert error == "ValueError", f"rank {rank}: {error} {message}"
        assert re.search(DISAGREEMENTS[name][1], message, re.S), f"rank {rank}: {message}"
        assert after == pytest.approx(truth(name), rel=1e-6)


@pytest.mark.parametrize("size, wrong_rank", WHO, ids="{}".format)
@pytest.mark.parametrize("name", [name for name in DISAGREEMENTS if name not in OUT_OF_STEP])
def test_ranks_that_disagree_later(name, size, wrong_rank):
    for rank, (error, message, before, after) in enumerate(
        pool(size).run(err, "DISAGREEMENTS", name, wrong_rank, later=True)
    ):
        assert error == "ValueError", f"rank {rank}: {error} {message}"
        assert re.search(DISAGREEMENTS[name][1], message, re.S), f"rank {rank}: {message}"
        assert before == after


def err_later_only(name: str, wrong_rank: int):
    rank, shard_of = dist.get_rank(), kept_shards(fresh_group())
    correct = correct_call(rank, dist.get_world_size())
    correct.loss(shard_of)
    wrong = (MISTAKES | DISAGREEMENTS)[name][0](correct) if rank == wrong_rank else correct
    wrong.loss(shard_of)


@pytest.mark.parametrize("name", OUT_OF_STEP + OUT_OF_STEP_MISTAKES)
def test_ranks_out_of_step_all_end_in_time(name):
    outcomes = pool(3).attempt(err_later_only, name, 1)
    pool(3).close(kill=True)
    assert all(outcome.error for outcome in outcomes), [outcome.error or "no error" for outcome in outcomes]


def test_alone_the_error_is_the_same():
    logits, target = torch.randn(3, 4), torch.tensor([0, 4, -100])
    with pytest.raises(ValueError, match=r"target.*\[0, 4\).*4"):
        smoothed_cross_entropy(logits, target)
    with pytest.raises(ValueError, match=r"whole vocabulary|cover"):
        vocab_parallel_cross_entropy(logits, target, VocabShard(0, 4, 5))


ALONE_WRONG = {
    "sum": (torch.full((4,), 0.5), None, r"sum to 1.*2"),
    "negative": (torch.tensor([-0.5, 0.5, 0.5, 0.5]), None, "negative or NaN"),
    "nan": (torch.tensor([torch.nan, 0.5, 0.25, 0.25]), None, "negative or NaN"),
    "late": (None, (5, 9, 9), "follow one another from 0"),
    "short": (None, (0, 4, 9), r"cover the vocabulary \[0, 9\)"),
}


def alone_wrong(name: str, head: str):
    prior, bounds, _ = ALONE_WRONG[name]
    shard = None if bounds is None else VocabShard(*bounds, fresh_group())
    target, options = torch.tensor([0, 3, -100]), {"smoothing_prior": prior, "label_smoothing": 0.1}
    if head == "sharded":
        return vocab_parallel_cross_entropy(torch.randn(3, 4), target, shard, **options)
    return vocab_parallel_linear_cross_entropy(torch.randn(3, 2), torch.randn(4, 2), target, shard, **options)


@pytest.mark.parametrize("head", ["sharded", "fused"])
@pytest.mark.parametrize("name", ALONE_WRONG)
def test_one_rank_finds_out_by_itself(name, head):
    """What several ranks find out together, a single rank finds out without any collective."""
    (outcome,) = pool(1).attempt(alone_wrong, name, head)
    assert outcome.error == "ValueError" and re.search(ALONE_WRONG[name][2], outcome.message), outcome


def test_integers_of_numpy_are_integers():
    options = LossOptions(ignore_index=np.int64(-7))
    assert options.problem() is None and options == LossOptions(ignore_index=-7)
    assert options.digest() == LossOptions(ignore_index=-7).digest()  # what ranks compare


@pytest.mark.parametrize("shape", [(4, 7, 5), (4, 7, 5, 3), (1, 7, 5)])
def test_logits_as_cross_entropy_takes_them(shape):
    """`[N, C, d...]`: refused, with what to do; done so, the loss is the same."""
    logits = torch.randn(shape)
    target = torch.randint(3, (shape[0], *shape[2:]))
    with pytest.raises(ValueError, match=r"target must have shape .* F\.cross_entropy takes them: \.movedim"):
        smoothed_cross_entropy(logits, target)
    with pytest.raises(ValueError, match=r"^(?!.*movedim)"):
        smoothed_cross_entropy(logits, target[..., :-1])
    assert torch.allclose(
        smoothed_cross_entropy(logits.movedim(1, -1), target, label_smoothing=0.1),
        torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1),
    )
