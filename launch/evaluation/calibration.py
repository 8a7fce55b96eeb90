"""Calibration of held-out rows while a run trains: figures without intervals, from the numbers of each token."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.evaluation.figures import Tokens, reliability, resampled
from launch.evaluation.numbers import batch_numbers, shifted
from launch.evaluation.report import TEMPERATURES
from launch.process.ranks import on_all_ranks
from smoothing import TokenNumbers

KEPT = ("nll", "confidence", "correct", "entropy", "sum_square")
OF_ITS_OWN = ("nll", "perplexity", "accuracy")  # of the model as it is: the trainer logs them, or as good as


class Calibration:
    """Takes the batches of one evaluation after another.

    Args:
        causal: The causal LM.
        label_smoothing: ε that it is trained with; above 0 the figures are those without it as well.
        tp: How many ranks see the same tokens.
        prior: `[V]` that it is trained with, on the device; None: uniform.
    """

    def __init__(self, causal: Any, label_smoothing: float, tp: int, prior: Tensor | None = None):
        self.causal, self.tp, self.prior = causal, tp, prior
        self.epsilon = label_smoothing if label_smoothing < 1 else 0.0
        self.bins: dict[str, list[float]] = {}  # of the last evaluation, for a diagram
        self.reset()

    def reset(self) -> None:
        """Forget the batches so far."""
        self._kept: list[list[np.ndarray]] = []
        self._nll_at = np.zeros((2, len(TEMPERATURES)))

    def add(self, model: Callable[..., Any], inputs: Mapping[str, Any]) -> TokenNumbers:
        """Take a batch with labels, and return its numbers.

        Collectives: those of `batch_numbers`.
        """
        inputs = dict(inputs)
        target = shifted(inputs.pop("labels"))
        inputs.pop("label_tokens", None)  # for the installed loss
        options = {"temperatures": TEMPERATURES, "unsmooth": self.epsilon}
        numbers = batch_numbers(model, self.causal, inputs | {"use_cache": False}, target, self.prior, **options)
        kept = []
        for at, one in enumerate((numbers, numbers.unsmoothed)):
            if one is not None:
                kept += [_to_numpy(getattr(one, name)[numbers.valid]) for name in KEPT]
                self._nll_at[at] += one.nll_at.double().flatten(0, -2).sum(0).cpu().numpy()
        self._kept.append(kept)
        return numbers

    def figures(self) -> dict[str, float]:
        """Return the figures of all ranks' batches by name, and forget the batches.

        Collectives: one gather of objects.
        """
        own = ([np.concatenate(arrays) for arrays in zip(*self._kept, strict=True)], self._nll_at)
        self.reset()
        parts = on_all_ranks(lambda: own)[:: self.tp]
        whole = [np.concatenate(arrays) for arrays in zip(*(kept for kept, _ in parts if kept), strict=True)]
        nll_at = sum(sums for _, sums in parts)
        if not whole or not len(whole[0]):
            return {}
        plain = _measured(whole[: len(KEPT)], nll_at[0])
        self.bins = reliability(_tokens(whole[: len(KEPT)], nll_at[0]))
        figures = {name: value for name, value in plain.items() if name not in OF_ITS_OWN}
        if len(whole) > len(KEPT):
            without = _measured(whole[len(KEPT) :], nll_at[1])
            figures |= {f"unsmoothed_{name}": value for name, value in without.items()}
        return figures


def _measured(arrays: list[np.ndarray], nll_at: np.ndarray) -> dict[str, float]:
    figures = resampled(_tokens(arrays, nll_at), TEMPERATURES, np.ones((1, 1), dtype=int))
    return {name: float(value[0]) for name, value in figures.items()}


def _tokens(arrays: list[np.ndarray], nll_at: np.ndarray) -> Tokens:
    """Tokens as if of one row; of the nll at each temperature only the mean is known, and asked for."""
    nll, confidence, correct, entropy, sum_square = (array.astype(float) for array in arrays)
    nothing = np.zeros(len(nll), dtype=int)
    mean_at = np.broadcast_to(nll_at / len(nll), (len(nll), len(nll_at)))
    return Tokens(nothing, nothing, nll, confidence, correct, entropy, sum_square, mean_at)


def _to_numpy(x: Tensor) -> np.ndarray:
    return x.to(torch.float32).cpu().numpy()
