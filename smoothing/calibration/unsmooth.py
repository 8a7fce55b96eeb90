"""Smoothing taken out of a model's probabilities, with nothing fitted."""

import torch
from torch import Tensor

from smoothing.calibration.numbers import FLOOR
from smoothing.calibration.sums import log_unsmoothed


def unsmooth(
    log_probs: Tensor, label_smoothing: float, *, prior: Tensor | None = None, floor: float = FLOOR
) -> Tensor:
    """Return the log-probabilities that a model trained with smoothed labels would have without the smoothing.

        p' = max((p - ε·u) / (1-ε), floor·u) / Σ_v max(...)

    The cross entropy with smoothed labels is least at `(1-ε)·p + ε·u`, of which p' is the inverse. Where an entry has
    less than ε·u, which no smoothed distribution does, `floor·u` stands in, and the sum is made 1 again: so
    nll never exceeds `log(1 / (floor·u)) + log Σ`, and all floors together hold at most `floor` of the probability.
    With a uniform prior the order of the entries is kept. For sharded logits see `token_numbers(unsmooth=ε)`.

    Args:
        log_probs: `[..., V]` floating point: whole log-probabilities, as of `log_softmax`.
        label_smoothing: ε that the model was trained with, in [0, 1).
        prior: `[V]` u, the prior that it was trained with; None: uniform.
        floor: the least that is left of each entry's u, in (0, 1].

    Returns:
        Log-probabilities of the same shape, fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: if an argument is wrong.

    Collectives:
        None.
    """
    if not isinstance(log_probs, Tensor) or not log_probs.is_floating_point() or log_probs.dim() == 0:
        raise ValueError("log_probs must be a floating-point tensor with the vocabulary as its last dimension")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing!r}")
    if not 0 < floor <= 1:
        raise ValueError(f"floor must lie in (0, 1], got {floor!r}")
    if prior is not None and prior.shape != log_probs.shape[-1:]:
        raise ValueError(f"prior must have shape {tuple(log_probs.shape[-1:])}, got {tuple(prior.shape)}")
    dtype = torch.float64 if log_probs.dtype == torch.float64 else torch.float32
    if label_smoothing == 0:
        return log_probs.to(dtype)
    u = 1 / log_probs.shape[-1] if prior is None else prior.to(log_probs.device, dtype)
    return log_unsmoothed(log_probs.to(dtype), float(label_smoothing), u, floor)
