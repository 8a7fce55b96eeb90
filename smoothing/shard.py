"""Which rows of the vocabulary a rank holds: integers, and the group that holds the rest."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Columns `[start, stop)` of a vocabulary of `vocab_size`, shared with the ranks of `group`.

    Columns at or past `vocab_size` are padding: they take part in nothing and get exactly zero gradient. Shards may
    be uneven, and one may be all padding.

    Args:
        start: first column that this rank holds.
        stop: one past its last column.
        vocab_size: columns of the vocabulary, without padding.
        group: process group whose ranks hold the vocabulary; None: this rank holds all of it.

    Raises:
        ValueError: for wrong bounds, at once only without a group; with one they are checked where all ranks compare
            theirs, in the first loss, so that the ranks fail together.

    Collectives:
        None.
    """

    start: int
    stop: int
    vocab_size: int
    group: dist.ProcessGroup | None = None
    # columns of the largest shard, once the ranks have agreed on theirs (see `agreement`)
    widest: int | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.group is None and (problem := self.problem() or self._uncovered()):
            raise ValueError(problem)

    @classmethod
    def whole(cls, vocab_size: int) -> "VocabShard":
        """Return the whole vocabulary on one rank."""
        return cls(0, vocab_size, vocab_size)

    @classmethod
    def split(cls, vocab_size: int, group: dist.ProcessGroup) -> "VocabShard":
        """Return this rank's part of the near-even split over `group`, as DeepSpeed's AutoTP makes it."""
        start, stop = cls.bounds(vocab_size, dist.get_world_size(group))[dist.get_rank(group)]
        return cls(start, stop, vocab_size, group)

    @classmethod
    def of(cls, lm_head: Any) -> "VocabShard":
        """Return the shard that a DeepSpeed `VocabParallelLinear` holds."""
        if lm_head.mp_group is None or dist.get_world_size(lm_head.mp_group) == 1:
            return cls.whole(lm_head.vocab_size)
        return cls(lm_head.vocab_start_index, lm_head.vocab_end_index, lm_head.vocab_size, lm_head.mp_group)

    @staticmethod
    def bounds(vocab_size: int, world_size: int) -> list[tuple[int, int]]:
        """Return `[(start, stop), ...]` of the near-even split: the first `vocab_size % world_size` get one more."""
        size, more = divmod(vocab_size, world_size)
        starts = [rank * size + min(rank, more) for rank in range(world_size + 1)]
        return list(pairwise(starts))

    def agree(self, widest: int) -> None:
        """Remember that the ranks have agreed on their shards, and how many columns the largest has."""
        object.__setattr__(self, "widest", widest)

    @property
    def size(self) -> int:
        """Columns held, padding included: the logits' last dimension."""
        return self.stop - self.start

    @property
    def real_size(self) -> int:
        """Columns held that are not padding."""
        return max(0, min(self.stop, self.vocab_size) - self.start)

    def part_of(self, whole_V: Tensor) -> Tensor:
        """Return this rank's part of `[vocab_size]` numbers, `[size]`, with zeros for padding."""
        own = whole_V[self.start : self.stop]
        return own if len(own) == self.size else F.pad(own, (0, self.size - len(own)))

    @property
    def world_size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def problem(self) -> str | None:
        """Return what is wrong with these bounds by themselves, or None."""
        bounds = (self.start, self.stop, self.vocab_size)
        if not all(isinstance(bound, int) for bound in bounds):
            return f"VocabShard takes integers for start, stop and vocab_size, got {bounds}"
        if not 1 <= self.vocab_size < 2**63 or not 0 <= self.start <= self.stop < 2**63:
            return f"expected 0 <= start <= stop < 2^63 and 1 <= vocab_size, got start, stop, vocab_size = {bounds}"
        return None

    def _uncovered(self) -> str | None:
        if self.start == 0 and self.stop >= self.vocab_size:
            return None
        return (
            f"a shard without a group must hold the whole vocabulary [0, {self.vocab_size}), got "
            f"[{self.start}, {self.stop}); pass group=, the process group whose ranks hold the other columns"
        )
