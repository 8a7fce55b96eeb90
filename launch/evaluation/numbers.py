"""The numbers of the tokens of one batch: a forward of a model whose vocabulary may be sharded."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from smoothing import TokenNumbers, VocabShard, linear_token_numbers, token_numbers
from smoothing.model.head_weight import acting_head, is_sharded, linear_map, linear_problem
from smoothing.model.support import own_scale, own_softcap


@torch.no_grad()
def batch_numbers(
    model: Callable[..., Any],
    causal: Any,
    inputs: Mapping[str, Tensor],
    target: Tensor,
    prior: Tensor | None = None,
    **options: Any,
) -> TokenNumbers:
    """Return the numbers of a batch; a linear head computes them in the place of its logits.

    Args:
        model: Called with the inputs: the causal LM, or what wraps it.
        causal: The causal LM.
        inputs: Keyword arguments of the model, without labels.
        target: The label that each position predicts.
        prior: `[V]` that the model was trained with; None: uniform.
        **options: Keyword arguments of `token_numbers`.

    Collectives: those of the forward, and of `token_numbers`.
    """
    head = acting_head(causal)
    shard = VocabShard.of(head) if is_sharded(head) else None
    if linear_problem(head) is not None or own_scale(causal) != 1:
        logits = model(**inputs).logits
        whole = shard is None or logits.shape[-1] == shard.vocab_size
        shard = None if whole else shard
        return token_numbers(logits, target, shard, smoothing_prior=part_of(prior, shard), **options)
    options["smoothing_prior"] = part_of(prior, shard)
    found: list[TokenNumbers] = []

    def in_place_of_logits(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        hidden, weight, bias = linear_map(head, hidden)
        cap = own_softcap(causal)
        found.append(linear_token_numbers(hidden, weight, target, shard, bias=bias, logit_softcap=cap, **options))
        return hidden.new_zeros(1, 1, 1)

    with _forward(head, in_place_of_logits):
        model(**inputs)
    return found[0]


def part_of(prior: Tensor | None, shard: VocabShard | None) -> Tensor | None:
    """Return this rank's slice of a prior."""
    return prior if prior is None or shard is None else shard.part_of(prior)


def shifted(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Return the label that each position predicts: the next one's."""
    return torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), ignore_index)], 1)


class _forward:
    """Entered, another forward stands in for a module's own."""

    def __init__(self, module: Any, forward: Callable[..., Tensor]):
        self.module, self.forward = module, forward

    def __enter__(self) -> None:
        self.own = vars(self.module).get("forward")
        self.module.forward = self.forward

    def __exit__(self, *_: object) -> None:
        del self.module.forward
        if self.own is not None:
            self.module.forward = self.own
