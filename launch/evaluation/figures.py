"""Calibration in figures, with intervals over rows, from the numbers of each token.

Legend: N tokens, R rows, B resamples.
"""

from dataclasses import dataclass, fields

import numpy as np

BINS = 15
RESAMPLES = 1000
POINTS = 50  # of a curve that is drawn
TIE_DIGITS = 6  # confidences that differ by less are ties: fp32 gives them another order on other ranks
LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Tokens:
    """Of each token with a label, in the order of the rows, fp64 `[N]`; `row` is its place, `kind` its class."""

    row: np.ndarray
    kind: np.ndarray
    nll: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray
    entropy: np.ndarray
    sum_square: np.ndarray
    nll_at: np.ndarray  # [N, G]

    def of(self, chosen: np.ndarray) -> "Tokens":
        """Return the chosen tokens, their rows numbered anew."""
        picked = {field.name: getattr(self, field.name)[chosen] for field in fields(self)}
        return Tokens(**picked | {"row": np.unique(picked["row"], return_inverse=True)[1]})

    @property
    def brier(self) -> np.ndarray:
        """Squared distance from the label, over the whole vocabulary."""
        return 1 - 2 * np.exp(-self.nll) + self.sum_square


def resamples(rows: int, count: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Return how often each row is drawn in each resample, `[B, R]`; the first has each row once."""
    draws = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=count)
    return np.concatenate([np.ones((1, rows), dtype=draws.dtype), draws])


def measure(tokens: Tokens, temperatures: tuple[float, ...]) -> dict:
    """Return each figure, and beside it as `NAME_interval` what 95 % of the resamples of rows lie in."""
    return with_intervals(resampled(tokens, temperatures, resamples(int(tokens.row.max()) + 1)))


def resampled(tokens: Tokens, temperatures: tuple[float, ...], counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return each figure of every resample of the rows, `[B]`; `counts` as `resamples` makes them."""
    means = _Means(tokens.row, counts.shape[1], counts)
    order = np.round(tokens.confidence, TIE_DIGITS)
    correct = mean_of_ties(order, tokens.correct)
    by_mass, by_width = equal_mass_bins(order), equal_width_bins(tokens.confidence)
    mass_gap, mass_accuracy, share = _gaps(means, by_mass, tokens.confidence, correct)
    width_gap, _, width_share = _gaps(means, by_width, tokens.confidence, tokens.correct)
    accuracy, confidence = means(tokens.correct), means(tokens.confidence)
    nll = means(tokens.nll)
    return {
        "nll": nll,
        "perplexity": np.exp(nll),
        "accuracy": accuracy,
        "confidence": confidence,
        "confidence_minus_accuracy": confidence - accuracy,
        "ece_equal_mass": (share * np.abs(mass_gap)).sum(1),
        "ece_equal_width": (width_share * np.abs(width_gap)).sum(1),
        "maximum_calibration_error": np.abs(mass_gap).max(1),
        "brier": means(tokens.brier),
        "brier_top_label": means(tokens.confidence * (tokens.confidence - 2 * tokens.correct) + tokens.correct),
        "brier_reliability": (share * mass_gap**2).sum(1),
        "brier_resolution": (share * (mass_accuracy - accuracy[:, None]) ** 2).sum(1),
        "brier_uncertainty": accuracy * (1 - accuracy),
        "entropy": means(tokens.entropy),
        "aurc": aurc(order, tokens.correct, counts[:, tokens.row]),
        "temperature": fitted(np.stack([means(column) for column in tokens.nll_at.T], 1), temperatures),
    }


def with_intervals(values: dict[str, np.ndarray]) -> dict:
    """Return the first of each figure's values, and as `NAME_interval` what 95 % of the others lie in."""
    figures: dict = {}
    for name, value in values.items():
        figures[name] = float(value[0])
        drawn = value[1:][np.isfinite(value[1:])]
        figures[f"{name}_interval"] = np.quantile(drawn, LEVELS).tolist() if len(drawn) else None
    return figures


class _Means:
    """Means over the tokens of each resample."""

    def __init__(self, row: np.ndarray, rows: int, counts: np.ndarray):
        self.row, self.rows, self.counts = row, rows, counts
        self.tokens = counts @ np.bincount(row, minlength=rows)

    def sums(self, values: np.ndarray) -> np.ndarray:
        return self.counts @ np.bincount(self.row, values, minlength=self.rows)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return self.sums(values) / self.tokens


def _gaps(
    means: _Means, bins: np.ndarray, confidence: np.ndarray, correct: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence minus accuracy of each bin, its accuracy, and its share of the tokens, `[B, BINS]`."""
    held = [(bins == index).astype(float) for index in range(BINS)]
    tokens = np.stack([means.sums(inside) for inside in held], 1)
    gap = np.stack([means.sums(inside * (confidence - correct)) for inside in held], 1)
    right = np.stack([means.sums(inside * correct) for inside in held], 1)
    many = np.maximum(tokens, 1)
    return gap / many, right / many, tokens / means.tokens[:, None]


def equal_mass_bins(confidence: np.ndarray) -> np.ndarray:
    """Return each token's bin: sorted by confidence, as near to equal in number as can be."""
    bins = np.empty(len(confidence), dtype=int)
    for index, part in enumerate(np.array_split(np.argsort(confidence, kind="stable"), BINS)):
        bins[part] = index
    return bins


def equal_width_bins(confidence: np.ndarray) -> np.ndarray:
    """Return each token's bin, of `(i/15, (i+1)/15]`."""
    return np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)


def mean_of_ties(confidence: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return values of which tokens with the same confidence share the mean: their order means nothing."""
    _, group = np.unique(confidence, return_inverse=True)
    return (np.bincount(group, values) / np.bincount(group))[group]


def aurc(confidence: np.ndarray, correct: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the area under the risk-coverage curve, `[B]`: the error of the most confident, over how many.

    Args:
        confidence: `[N]`.
        correct: `[N]`.
        weights: how often each token is drawn, `[B, N]`.
    """
    order = np.argsort(-confidence, kind="stable")
    error = 1 - mean_of_ties(confidence, correct)[order]
    areas = []
    for weight in weights:
        errors = np.repeat(error, weight[order])
        areas.append((np.cumsum(errors) / np.arange(1, len(errors) + 1)).mean())
    return np.array(areas)


def risk_coverage(tokens: Tokens) -> dict[str, list[float]]:
    """Return the error of the most confident tokens, over which share of all they are, for a diagram."""
    confidence = np.round(tokens.confidence, TIE_DIGITS)
    order = np.argsort(-confidence, kind="stable")
    error = np.cumsum(1 - mean_of_ties(confidence, tokens.correct)[order])
    taken = np.unique(np.ceil(np.linspace(0, 1, POINTS + 1)[1:] * len(order)).astype(int))
    return {"coverage": (taken / len(order)).tolist(), "error": (error[taken - 1] / taken).tolist()}


def fitted(nll_BG: np.ndarray, temperatures: tuple[float, ...]) -> np.ndarray:
    """Return the temperature of the least nll, `[B]`: the least of a parabola around the best of the grid."""
    best = np.clip(nll_BG.argmin(1), 1, len(temperatures) - 2)
    x = np.log(temperatures)
    step = x[1] - x[0]
    left, middle, right = (np.take_along_axis(nll_BG, (best + by)[:, None], 1)[:, 0] for by in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = np.where(bend > 0, 0.5 * (left - right) / np.where(bend > 0, bend, 1), 0.0)
    return np.exp(x[best] + step * np.clip(shift, -1, 1))


def reliability(tokens: Tokens) -> dict[str, list[float]]:
    """Return confidence and accuracy of each bin of equal mass, and its share of tokens, for a diagram."""
    correct, bins = mean_of_ties(tokens.confidence, tokens.correct), equal_mass_bins(tokens.confidence)
    present = np.unique(bins)
    return {
        "confidence": [float(tokens.confidence[bins == index].mean()) for index in present],
        "accuracy": [float(correct[bins == index].mean()) for index in present],
        "tokens": [int((bins == index).sum()) for index in present],
    }
