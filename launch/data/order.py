"""The order in which rows are trained on, where it is not plainly random: a function of seed and epoch alone."""

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class GroupedByLength(LengthGroupedSampler):
    """Rows of like length together, drawn anew each epoch.

    transformers' own sampler draws from the process's generator, which stands elsewhere once a run goes on from a
    checkpoint, and on other ranks.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()
