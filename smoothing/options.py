"""What a smoothed cross entropy is asked to be: the numbers that all ranks must have alike."""

import math
import zlib
from dataclasses import dataclass

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class LossOptions:
    """The scalar arguments of every loss in this package, in one place.

    For a token with logits `z`, target `y`, smoothing `ε` and prior `u` (uniform: `1/V`):

        z      = cap·tanh(z / cap)                              with logit_softcap
        loss   = lse(z) - (1-ε)·z_y - ε·Σ_v u_v z_v + z_loss·lse(z)²
        ∂/∂z_v = softmax(z)_v·(1 + 2·z_loss·lse(z)) - (1-ε)·[v=y] - ε·u_v
    """

    label_smoothing: float = 0.0
    ignore_index: int = -100
    reduction: str = "mean"
    z_loss: float = 0.0
    logit_softcap: float | None = None

    def fault(self) -> str | None:
        """What is wrong with these numbers, or None."""
        if not _is_number(self.label_smoothing) or not 0.0 <= self.label_smoothing <= 1.0:
            return f"label_smoothing must lie in [0, 1], got {self.label_smoothing!r}"
        if self.reduction not in REDUCTIONS:
            return f"reduction must be one of {', '.join(REDUCTIONS)}, got {self.reduction!r}"
        if not isinstance(self.ignore_index, int):
            return f"ignore_index must be an integer, got {self.ignore_index!r}"
        if not _is_number(self.z_loss) or not 0.0 <= self.z_loss < math.inf:
            return f"z_loss must be a finite number of at least 0, got {self.z_loss!r}"
        cap = self.logit_softcap
        if cap is not None and not (_is_number(cap) and 0 < cap < math.inf):
            return f"logit_softcap must be None or a finite number above 0, got {cap!r}"
        return None

    def digest(self, *more) -> int:
        """A number that differs (practically always) where any option, or any of `more`, differs."""
        return zlib.crc32(repr((self, more)).encode())


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
