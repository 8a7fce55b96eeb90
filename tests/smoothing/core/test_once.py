"""No gradient of a loss has a gradient of its own: whoever differentiates one is told so, on every rank."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from smoothing import VocabShard, vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from smoothing.model.gather_logits import gather_logits
from tests.support.ranks import pool

VOCAB, HIDDEN = 7, 3
TARGET = torch.tensor([1, 2, -100, 4])
AGAIN = "gradient of this loss cannot be differentiated again"


def loss_of(kind: str, shard: VocabShard | None = None):
    """A loss of this rank's part, and the tensors that it is differentiated by."""
    torch.manual_seed(0)
    columns = slice(None) if shard is None else slice(shard.start, shard.stop)
    shapes = [(len(TARGET), HIDDEN), (VOCAB, HIDDEN), (VOCAB,), (len(TARGET), VOCAB)]
    hidden, weight, bias, logits = (torch.randn(shape, dtype=torch.double) for shape in shapes)
    options = {"label_smoothing": 0.1, "reduction": "none" if kind.endswith("none") else "mean"}
    if kind.startswith("fused"):
        given = [hidden, weight[columns], bias[columns]]

        def loss(hidden, weight, bias):
            return vocab_parallel_linear_cross_entropy(hidden, weight, TARGET, shard, bias=bias, **options).sum()
    elif kind == "gathered":
        given = [logits[:, columns]]

        def loss(logits):
            return F.cross_entropy(gather_logits(logits, shard), TARGET, label_smoothing=0.1)
    else:
        given = [logits[:, columns]]

        def loss(logits):
            in_place = kind == "logits-in-place"
            # in place of a copy: what a leaf holds cannot be overwritten
            own = logits * 1 if in_place else logits
            return vocab_parallel_cross_entropy(own, TARGET, shard, inplace_backward=in_place, **options).sum()

    return loss, [x.contiguous().requires_grad_() for x in given]


def penalty_alone(loss, given):
    gradients = torch.autograd.grad(loss(*given), given, create_graph=True)
    sum(grad.square().sum() for grad in gradients).backward()


def penalty_by(index, loss, given):
    """Of one gradient, differentiated by its input only: the graph must lead from each to each."""
    gradients = torch.autograd.grad(loss(*given), given, create_graph=True)
    torch.autograd.grad(gradients[index].square().sum() + given[index].square().sum(), given[index])


def penalty_of_a_scaled_loss(loss, given):
    """The upstream gradient has a graph of its own here."""
    gradients = torch.autograd.grad(loss(*given).square(), given, create_graph=True)
    gradients[0].sum().backward()


def hessian(loss, given):
    torch.autograd.functional.hessian(loss, tuple(given))


def second_order(loss, given):
    gradgradcheck(loss, given)


TWICE = {
    "penalty": penalty_alone,
    "by-first": partial(penalty_by, 0),
    "by-last": partial(penalty_by, -1),
    "scaled": penalty_of_a_scaled_loss,
    "hessian": hessian,
    "gradgradcheck": second_order,
}
KINDS = ["logits", "logits-in-place", "logits-none", "fused", "fused-none"]


@pytest.mark.parametrize("twice", TWICE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_derivative_is_refused(kind, twice):
    with pytest.raises(RuntimeError, match=AGAIN):
        TWICE[twice](*loss_of(kind))


def refusals_of_a_rank(kind: str) -> list[str]:
    shard = VocabShard.split(VOCAB, dist.group.WORLD)
    told = []
    for name in ("penalty", "by-first", "by-last", "scaled"):
        try:
            TWICE[name](*loss_of(kind, shard))
            told.append("nothing")
        except RuntimeError as error:
            told.append(str(error))
    return told


@pytest.mark.parametrize("kind", [*KINDS, "gathered"])
def test_every_rank_refuses_a_second_derivative(kind):
    for told in pool(2).run(refusals_of_a_rank, kind):
        assert [message for message in told if AGAIN not in message] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_that_is_not_differentiated_changes_nothing(kind):
    loss, given = loss_of(kind)
    plain = torch.autograd.grad(loss(*given), given)
    with_graph = torch.autograd.grad(loss(*given), given, create_graph=True)
    assert all(torch.equal(first, second) for first, second in zip(plain, with_graph, strict=True))
    assert all(grad.requires_grad for grad in with_graph)
    if kind not in ("fused", "logits-in-place"):  # whose gradients are handed over once: gradcheck asks twice
        assert gradcheck(loss, given)


def test_a_frozen_input_is_left_out():
    loss, (hidden, weight, bias) = loss_of("fused")
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    (gradient,) = torch.autograd.grad(loss(hidden, weight, bias), [hidden], create_graph=True)
    with pytest.raises(RuntimeError, match=AGAIN):
        gradient.sum().backward()


def test_a_penalty_on_something_else_is_no_second_derivative():
    loss, given = loss_of("logits")
    value = loss(*given)
    torch.autograd.grad(value, given, create_graph=True)
    (value.detach() + given[0].square().sum()).backward()
    assert torch.equal(given[0].grad, 2 * given[0].detach())


@pytest.mark.parametrize("transform", ["grad", "jacrev", "vmap"])
@pytest.mark.parametrize("kind", ["logits", "fused"])
def test_transforms_of_functions_are_refused(kind, transform):
    loss, given = loss_of(kind)
    given = [x.detach() for x in given]
    if transform == "vmap":
        given = [torch.stack([x, x]) for x in given]
    with pytest.raises(ValueError, match=r"torch\.func.*cannot transform.*torch\.autograd\.grad"):
        getattr(torch.func, transform)(loss)(*given)
