"""The scalar options of a smoothed cross entropy, which all ranks must have alike."""

import zlib
from dataclasses import dataclass
from numbers import Integral, Real

REDUCTIONS = ("mean", "sum", "none")
FLOATS = ("label_smoothing", "z_loss", "logit_softcap", "logit_scale")
DEFAULT_IGNORE_INDEX = -100  # torch's
LARGEST = 2.0**1000  # a number of this size is a mistake, and float() still takes it


@dataclass(frozen=True)
class LossOptions:
    """The scalar arguments of every loss in this package, in one place.

    For a token with logits `z`, target `y`, smoothing `ε` and prior `u` (uniform: `1/V`):

        z      = scale·z, then cap·tanh(z / cap)                with logit_scale, logit_softcap
        loss   = lse(z) - (1-ε)·z_y - ε·Σ_v u_v z_v + z_loss·lse(z)²
        ∂/∂z_v = softmax(z)_v·(1 + 2·z_loss·lse(z)) - (1-ε)·[v=y] - ε·u_v
    """

    label_smoothing: float = 0.0
    ignore_index: int = DEFAULT_IGNORE_INDEX
    reduction: str = "mean"
    z_loss: float = 0.0
    logit_softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in FLOATS:  # 0 and 0.0 are one number, and digest must say so
            if _is_number(value := getattr(self, name)) and abs(value) < LARGEST:
                object.__setattr__(self, name, float(value))
        if _is_integer(self.ignore_index):  # numpy's too
            object.__setattr__(self, "ignore_index", int(self.ignore_index))

    def problem(self) -> str | None:
        """Return what is wrong with these numbers, or None."""
        if not _is_number(self.label_smoothing) or not 0.0 <= self.label_smoothing <= 1.0:
            return f"label_smoothing must lie in [0, 1], got {self.label_smoothing!r}"
        if self.reduction not in REDUCTIONS:
            return f"reduction must be one of {', '.join(REDUCTIONS)}, got {self.reduction!r}"
        if not _is_integer(self.ignore_index) or not -(2**63) <= self.ignore_index < 2**63:
            return f"ignore_index must be an integer of 64 bits, got {self.ignore_index!r}"
        if not _is_number(self.z_loss) or not 0.0 <= self.z_loss < LARGEST:
            return f"z_loss must be a finite number of at least 0, got {self.z_loss!r}"
        cap = self.logit_softcap
        if cap is not None and not (_is_number(cap) and 0 < cap < LARGEST):
            return f"logit_softcap must be None or a finite number above 0, got {cap!r}"
        if not _is_number(self.logit_scale) or not 0 < self.logit_scale < LARGEST:
            return f"logit_scale must be a finite number above 0, got {self.logit_scale!r}"
        return None

    def digest(self, *more: object) -> int:
        """Return a number that differs (practically always) where any option, or any of `more`, differs."""
        return zlib.crc32(repr((self, more)).encode())


def _is_integer(value: object) -> bool:
    if type(value) is int:  # asked in every call, and abstract classes are slow to answer
        return True
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    if type(value) is float:
        return value == value
    return isinstance(value, Real) and not isinstance(value, bool) and value == value
