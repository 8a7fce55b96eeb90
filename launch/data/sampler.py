"""The order of an epoch's rows: a function of seed and epoch alone, whatever the number of ranks."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

Order = Callable[[torch.Generator], list[int]]  # the rows of one epoch


class EpochSampler(Sampler[int]):
    """Yields each row once an epoch, then the blank rows that complete the last micro-batch of every rank.

    Without blank rows accelerate completes it with rows of the epoch's start, which are then trained on twice. A
    sampler that draws from the process's own generator yields another order in a resumed run.

    Args:
        order: Puts the rows of an epoch in order; its generator depends on `seed` and the epoch.
        rows: How many rows of that order are yielded.
        blanks: Where the blank rows are, which are yielded last.
        seed: Seed of the order.
    """

    def __init__(self, order: Order, rows: int, blanks: range, seed: int):
        self.order, self.rows, self.blanks, self.seed = order, rows, blanks, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows + len(self.blanks)

    def __iter__(self) -> Iterator[int]:
        rows = self.order(torch.Generator().manual_seed(self.seed + self.epoch))
        return chain(rows[: self.rows], self.blanks)


def shuffled(count: int) -> Order:
    """Rows in random order."""
    return lambda generator: torch.randperm(count, generator=generator).tolist()


def in_order(count: int) -> Order:
    """Rows in the order of the data."""
    return lambda _: list(range(count))


def grouped_by_length(lengths: Sequence[int], rows_a_step: int) -> Order:
    """Rows of similar length in a step, steps in random order; the step with the longest row comes first.

    transformers' own sampler sorts fifty steps at a time by length, which makes the loss a sawtooth.
    """

    def order(generator: torch.Generator) -> list[int]:
        rows = get_length_grouped_indices(lengths, rows_a_step, generator=generator)
        first, *steps = (rows[start : start + rows_a_step] for start in range(0, len(rows), rows_a_step))
        last = [steps.pop()] if steps and len(steps[-1]) < rows_a_step else []
        drawn = torch.randperm(len(steps), generator=generator).tolist()
        return list(chain(first, *(steps[index] for index in drawn), *last))

    return order
