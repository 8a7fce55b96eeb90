"""Counts of tokens and sums of their losses, exact over all ranks."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from smoothing import TokenNumbers, TokenStats


class Means(NamedTuple):
    """Means over label tokens, and how many of these and of all tokens there were."""

    nll: float
    accuracy: float
    lse_square: float  # of the log of the sum of exp(logits)
    labels: int
    tokens: int


class TokenMeter:
    """Sums over tokens since the last reading, kept on the device, so that a step needs no synchronisation."""

    def __init__(self):
        self.sums: torch.Tensor | None = None  # over label tokens: nll, correct, lse², count
        self._before: torch.Tensor | None = None
        self._tokens = 0  # including prompts

    def note(self, tokens: int) -> None:
        """Count the tokens that the model is about to read."""
        self._tokens += tokens

    def keep(self) -> None:
        """Make what was added until now permanent."""
        self._before = self.sums

    def drop(self) -> None:
        """Discard what was added since the last `keep`, for a step that was skipped."""
        self.sums = self._before

    def reset(self) -> None:
        """Forget everything."""
        self.sums, self._before, self._tokens = None, None, 0

    def add(self, stats: TokenStats) -> None:
        """Add the statistics of one forward."""
        self._add(stats.nll, stats.correct, stats.lse.square(), stats.valid)

    def add_numbers(self, numbers: TokenNumbers) -> None:
        """Add the numbers of one forward, which have no lse."""
        self._add(numbers.nll, numbers.correct, torch.zeros_like(numbers.nll), numbers.valid)

    def _add(self, *parts: torch.Tensor) -> None:
        now = torch.stack([part.sum(dtype=torch.float64) for part in parts])
        self.sums = now if self.sums is None else self.sums + now

    def read(self, copies: int, device) -> Means:
        """Return the means over all ranks and reset the sums.

        Args:
            copies: How many ranks see the same tokens (the tensor-parallel size).
            device: Where to reduce.

        Collectives:
            One all-reduce of five fp64 numbers.
        """
        sums = torch.zeros(5, dtype=torch.float64, device=device)
        if self.sums is not None:
            sums[:4] = self.sums
        sums[4] = self._tokens
        self.reset()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        *parts, labels, tokens = (sums / copies).tolist()
        nll, accuracy, lse_square = (part / max(labels, 1) for part in parts)
        return Means(nll, accuracy, lse_square, round(labels), round(tokens))
