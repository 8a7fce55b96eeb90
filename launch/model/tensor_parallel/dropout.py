"""Dropout of what an adapter is given, beside layers of which each tensor-parallel rank gets a part of the input."""

import torch.nn.functional as F
from torch import Tensor, nn


class DropoutOfAPart(nn.Dropout):
    """Drops from a rank's part of the input what one process drops there.

    Each rank draws for the whole input, [..., inputs], and takes its own part of that: so generators that began alike
    go on alike on all ranks.

    Args:
        p: The probability to drop a value.
        sizes: How many inputs each rank has.
        rank: This one.
    """

    def __init__(self, p: float, sizes: tuple[int, ...], rank: int):
        super().__init__(p)
        self.whole, self.first, self.own = sum(sizes), sum(sizes[:rank]), sizes[rank]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = F.dropout(x.new_ones(*x.shape[:-1], self.whole), self.p)
        return x * kept.narrow(-1, self.first, self.own)
