"""One forward of a model with a loss installed: what it was given for the loss, and what its output head gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoothing.shard import VocabShard


class Labels(NamedTuple):
    """What a model is given for its loss, or hands on to its `loss_function`; each may be None."""

    labels: Tensor | None = None
    shift_labels: Tensor | None = None
    num_items_in_batch: int | Tensor | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "Labels":
        return cls(*map(arguments.get, cls._fields))

    @property
    def given(self) -> bool:
        return self.labels is not None or self.shift_labels is not None

    def target(self, ignore_index: int) -> Tensor:
        """`[B, L]`: what each position is to predict."""
        if self.shift_labels is not None:
            return self.shift_labels
        assert self.labels is not None, "only where labels are given"
        return shifted(self.labels, ignore_index)

    def same(self, other: "Labels", ignore_index: int) -> bool:
        """Return whether these mean the same loss; values of tensors that are not the same are read on the host."""
        if all(own is its for own, its in zip(self, other, strict=True)):
            return True
        if (self.num_items_in_batch is None) != (other.num_items_in_batch is None):
            return False
        if self.num_items_in_batch is not None and self.num_items_in_batch != other.num_items_in_batch:
            return False
        target = self.target(ignore_index)
        return torch.equal(target, other.target(ignore_index).to(target.device))


def shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels `[B, L]` as targets: position i is to predict label i+1, the last one nothing."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


class Gives(Enum):
    """What the head makes of hidden states `[B, L, H]`."""

    ALL_LOGITS = auto()  # `[B, L, V]`, gathered if the head is sharded
    OWN_LOGITS = auto()  # `[B, L, S]`, this rank's
    LOSS = auto()  # `[1, 1, 1 + probes]` in place of logits


@dataclass
class ForwardState:
    """One forward of the model. `loss`: `hidden, lm_head -> []`, where that is what the head gives.

    `loss_called`: the model has called its `loss_function`. `shard`: whose rows the head's weight has been found to
    be, None where they are all.
    """

    gives: Gives = Gives.ALL_LOGITS
    labels: Labels = field(default_factory=Labels)
    loss: Callable[[Tensor, nn.Module], Tensor] | None = None
    placeholder: Tensor | None = None
    loss_called: bool = False
    shard: VocabShard | None = None
