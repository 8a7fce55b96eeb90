"""Gradients that have no gradient of their own: whoever differentiates one hears of it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TWICE = (
    "the gradient of this loss cannot be differentiated again, as a gradient penalty or a Hessian needs it "
    "(create_graph=True): take F.cross_entropy(label_smoothing=) of whole logits for that, or "
    "install_smoothed_loss(head='dense') without tensor parallelism"
)
TRANSFORMED = (
    "torch.func's transforms (grad, vmap, jvp, ...) cannot transform this loss; differentiate it with .backward() or "
    "torch.autograd.grad, or take F.cross_entropy(label_smoothing=) of whole logits"
)

Backward = Callable[..., Any]


def once_differentiable(backward: Backward) -> Backward:
    """Decorate the `backward` of an autograd Function whose gradients hold no graph, so that a second one raises.

    torch's decorator of this name raises only if the upstream gradient itself has a graph, which that of a loss has
    not: without a word, a penalty on the gradient would count for nothing. Here the gradients depend on whatever
    `ctx` has saved that needs a gradient, so a Function saves its inputs, or an `anchor` of each.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *upstream: Tensor | None) -> Any:
        if not torch.is_grad_enabled():  # no create_graph=True
            return backward(ctx, *upstream)
        depends_on = [x for x in (*ctx.saved_tensors, *upstream) if x is not None and x.requires_grad]
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        return _Twice.apply(len(depends_on), *depends_on, *gradients)  # type: ignore[no-untyped-call]  # torch has no types for it

    return once


def anchor(given: Tensor | None) -> Tensor | None:
    """Return nothing of a tensor but its place in the graph, to be saved where the tensor itself is not kept."""
    return given[:0].clone() if given is not None and given.requires_grad else None


def transform_problem() -> str | None:
    """Return why no loss can be computed under the transform of `torch.func` that is active, or None."""
    return TRANSFORMED if torch._C._are_functorch_transforms_active() else None


class _Twice(torch.autograd.Function):
    """Gradients as they are, after the `count` tensors that they depend on; their own backward raises."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        return tensors[count:]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        if any(grad is not None for grad in upstream):
            raise RuntimeError(TWICE)
        return (None,) * len(ctx.needs_input_grad)
