"""The order of training rows when grouped by length: a function of seed and epoch alone."""

from itertools import chain

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class GroupedByLength(LengthGroupedSampler):
    """Groups rows of similar length into steps, in a new random order each epoch; the longest row comes first.

    transformers' own sampler sorts fifty steps at a time by length, which makes the loss a sawtooth. It draws from
    the process's generator, whose state differs in a resumed run and between ranks.
    """

    def __init__(self, rows_a_step: int, lengths: list[int], seed: int):
        super().__init__(rows_a_step, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.epoch)
        rows = list(super().__iter__())
        first, *steps = (rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size))
        last = [steps.pop()] if steps and len(steps[-1]) < self.batch_size else []
        drawn = torch.randperm(len(steps), generator=self.generator).tolist()
        return chain(first, *(steps[index] for index in drawn), *last)
