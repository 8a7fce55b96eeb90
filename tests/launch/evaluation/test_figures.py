"""Figures of calibration, against definitions written another way."""

import numpy as np
import pytest

from launch.evaluation.figures import (
    BINS,
    TIE_DIGITS,
    Tokens,
    aurc,
    equal_width_bins,
    fitted,
    measure,
    resampled,
    resamples,
    risk_coverage,
)

TEMPERATURES = tuple(np.geomspace(0.4, 4.0, 15))


def made(rows: int = 40, seed: int = 0, sharpness: float = 1.0) -> tuple[Tokens, np.ndarray, np.ndarray]:
    """Tokens of a model whose logits are `sharpness` times the right ones; its logits and the labels too."""
    draw = np.random.default_rng(seed)
    row = np.repeat(np.arange(rows), draw.integers(1, 30, rows))
    logits = draw.normal(size=(len(row), 6)) * 2
    label = np.array([draw.choice(6, p=p) for p in softmax(logits)])
    logits = logits * sharpness
    p = softmax(logits)
    at = np.arange(len(row))
    nll_at = np.stack([-np.log(softmax(logits / t)[at, label]) for t in TEMPERATURES], 1)
    tokens = Tokens(
        row,
        np.zeros(len(row), dtype=int),
        -np.log(p[at, label]),
        p.max(1),
        (p.argmax(1) == label).astype(float),
        -(p * np.log(p)).sum(1),
        (p**2).sum(1),
        nll_at,
    )
    return tokens, p, label


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def naive_ece(groups, tokens: Tokens) -> float:
    total = 0.0
    for group in groups:
        if len(group):
            total += abs(sum(tokens.confidence[i] - tokens.correct[i] for i in group)) / len(tokens.row)
    return total


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_their_definitions(seed):
    tokens, p, label = made(seed=seed, sharpness=1.7)
    _, untied = np.unique(np.round(tokens.confidence, TIE_DIGITS), return_index=True)
    tokens, p, label = tokens.of(untied), p[untied], label[untied]
    got = measure(tokens, TEMPERATURES)
    one_hot = np.eye(p.shape[1])[label]
    assert got["brier"] == pytest.approx(((p - one_hot) ** 2).sum(1).mean(), rel=1e-12)
    assert got["nll"] == pytest.approx(-np.log(p[np.arange(len(label)), label]).mean(), rel=1e-12)
    ordered = sorted(range(len(label)), key=lambda i: tokens.confidence[i])
    assert got["ece_equal_mass"] == pytest.approx(naive_ece(np.array_split(ordered, BINS), tokens), rel=1e-9)
    edges = [(i / BINS, (i + 1) / BINS) for i in range(BINS)]
    groups = [[i for i in ordered if low < tokens.confidence[i] <= high] for low, high in edges]
    assert got["ece_equal_width"] == pytest.approx(naive_ece(groups, tokens), rel=1e-9)
    risks, errors = [], 0.0
    for taken, index in enumerate(reversed(ordered), start=1):
        errors += 1 - tokens.correct[index]
        risks.append(errors / taken)
    assert got["aurc"] == pytest.approx(np.mean(risks), rel=1e-12)


def test_the_brier_score_of_the_top_label_is_what_it_is_made_of():
    """Exactly so where all tokens of a bin have one confidence."""
    draw = np.random.default_rng(0)
    level = np.repeat(np.arange(BINS), 40)
    confidence = (level + 1) / (BINS + 1)
    right = (draw.random(len(level)) < confidence**2).astype(float)
    ones = np.ones(len(level))
    tokens = Tokens(level, level, ones, confidence, right, ones, ones, np.ones((len(level), 15)))
    got = {name: value[0] for name, value in resampled(tokens, TEMPERATURES, resamples(15, 0)).items()}
    by_bin = right.reshape(BINS, -1).mean(1)
    assert got["brier_top_label"] == pytest.approx(((confidence - right) ** 2).mean())
    assert got["brier_reliability"] == pytest.approx(((confidence.reshape(BINS, -1)[:, 0] - by_bin) ** 2).mean())
    assert got["brier_resolution"] == pytest.approx(((by_bin - right.mean()) ** 2).mean())
    parts = got["brier_reliability"] - got["brier_resolution"] + got["brier_uncertainty"]
    assert got["brier_top_label"] == pytest.approx(parts)


def test_the_area_is_that_under_the_curve_that_is_drawn():
    tokens, _, _ = made(rows=300)
    curve, area = risk_coverage(tokens), measure(tokens, TEMPERATURES)["aurc"]
    assert curve["coverage"][-1] == 1 and curve["error"][-1] == pytest.approx(1 - tokens.correct.mean())
    assert np.mean(curve["error"]) == pytest.approx(area, rel=0.02)


def test_a_tie_at_an_edge_is_in_the_bin_below():
    assert list(equal_width_bins(np.array([0.0, 1 / 15, 0.0667, 1.0]))) == [0, 0, 1, 14]


def test_tied_tokens_count_alike_in_any_order():
    confidence = np.array([0.9, 0.5, 0.5, 0.5])
    ones = np.ones((1, 4), dtype=int)
    areas = [aurc(confidence, np.array([1.0, *rest]), ones)[0] for rest in ((1, 0, 0), (0, 0, 1), (0, 1, 0))]
    assert areas == pytest.approx([np.mean([0, 1 / 3, 4 / 9, 0.5])] * 3)


def test_a_resample_is_the_figure_of_the_rows_it_drew():
    tokens, _, _ = made()
    counts = resamples(40, 3)
    drawn = np.concatenate([np.flatnonzero(tokens.row == row) for row in np.repeat(np.arange(40), counts[2])])
    repeated = tokens.of(drawn)
    for name in ("nll", "accuracy", "aurc", "ece_equal_width", "brier"):
        alone = resampled(tokens, TEMPERATURES, counts[[2]])[name][0]
        assert alone == pytest.approx(measure(repeated, TEMPERATURES)[name], rel=1e-9)


def test_rows_that_differ_make_an_interval_wider_than_their_tokens_would():
    row = np.repeat(np.arange(20), 50)
    one = np.ones(1000)
    right = (row % 2).astype(float)  # whole rows are right or wrong
    tokens = Tokens(row, row, one, one / 2, right, one, one, np.ones((1000, 15)))
    low, high = measure(tokens, TEMPERATURES)["accuracy_interval"]
    assert high - low > 0.3


@pytest.mark.parametrize("sharpness", [0.6, 1.0, 1.8])
def test_the_temperature_undoes_what_made_the_logits_too_sharp(sharpness):
    tokens, _, _ = made(rows=1500, sharpness=sharpness)
    best = fitted(tokens.nll_at.mean(0)[None], TEMPERATURES)[0]
    assert best == pytest.approx(sharpness, rel=0.05)
