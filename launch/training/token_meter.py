"""Counts of tokens and sums of their losses, exact over all ranks."""

import torch
import torch.distributed as dist

from smoothing import TokenStats


class TokenMeter:
    """Sums over tokens since the last reading, kept on the device, so that a step needs no synchronisation."""

    def __init__(self):
        self.sums: torch.Tensor | None = None  # over label tokens: nll, correct, count
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
        now = torch.stack(
            [stats.nll.sum(dtype=torch.float64), stats.correct.sum().double(), stats.valid.sum().double()]
        )
        self.sums = now if self.sums is None else self.sums + now

    def read(self, copies: int, device) -> tuple[float, float, int, int]:
        """Return the sums over all ranks and reset them.

        Args:
            copies: How many ranks see the same tokens (the tensor-parallel size).
            device: Where to reduce.

        Returns:
            Mean nll, accuracy and count of the label tokens, and the count of all tokens.

        Collectives:
            One all-reduce of four fp64 numbers.
        """
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        if self.sums is not None:
            sums[:3] = self.sums
        sums[3] = self._tokens
        self.reset()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        nll, correct, labels, tokens = (sums / copies).tolist()
        return nll / max(labels, 1), correct / max(labels, 1), round(labels), round(tokens)
