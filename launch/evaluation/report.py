"""An evaluation: the figures of a model as it is, after a temperature, unsmoothed, and of its base."""

from typing import Any

import numpy as np

from launch.common.errors import UserError
from launch.evaluation.choices import Questions
from launch.evaluation.figures import Tokens, fitted, measure, reliability, risk_coverage
from launch.evaluation.forward import KINDS, Evaluator

TEMPERATURES = tuple(float(t) for t in np.geomspace(0.4, 4.0, 15))
SHOWN = {
    "nll": "nll",
    "accuracy": "accuracy",
    "confidence": "confidence",
    "ece_equal_mass": "ECE",
    "brier": "Brier",
    "aurc": "AURC",
    "temperature": "T",
}
COLUMNS = {"": "as it is", "after_temperature": "after T", "unsmoothed": "unsmoothed", "base": "base"}


def evaluate(evaluator: Evaluator, rows: Any, kinds: np.ndarray, smoothing: float | None) -> dict:
    """Return all figures of one model; all ranks must call this.

    The temperature is fitted on every second row, and its figures are those of the other rows.
    """
    epsilon = evaluator.label_smoothing or 0.0 if smoothing is None else smoothing
    questions = Questions.of(rows["where"])
    every, every_without = evaluator.tokens(rows, kinds, temperatures=TEMPERATURES, unsmooth=epsilon)
    chosen = np.isin(every.row, questions.kept)
    plain = every.of(chosen)
    without = None if every_without is None else every_without.of(chosen)
    other = questions.kept[1::2]
    fit, rest = plain.of(plain.row % 2 == 0), plain.of(plain.row % 2 == 1)
    if not len(rest.row):
        raise UserError("one row cannot be halved, to fit a temperature and to test it; give more rows")
    temperature = float(fitted(fit.nll_at.mean(0)[None], TEMPERATURES)[0])
    scaled, _ = evaluator.tokens(rows.select(other), kinds, temperatures=TEMPERATURES, temperature=temperature)
    unsmoothed = plain if without is None else without
    return {
        "rows": len(questions.kept),
        "label_tokens": len(plain.row),
        **measure(plain, TEMPERATURES),
        "label_smoothing": epsilon,
        **_curves(plain),
        "by_class": _by_class(plain),
        "answers": _answers(questions, every),
        "after_temperature": {
            "fitted_temperature": temperature,
            "rows": len(other),
            **measure(scaled, TEMPERATURES),
            **_curves(scaled),
            "before": measure(rest, TEMPERATURES),
        },
        "unsmoothed": measure(unsmoothed, TEMPERATURES)
        | _curves(unsmoothed)
        | {
            "by_class": _by_class(unsmoothed),
            "answers": _answers(questions, every if every_without is None else every_without),
        },
    }


def _curves(tokens: Tokens) -> dict[str, dict]:
    return {"reliability": reliability(tokens), "risk_coverage": risk_coverage(tokens)}


def _answers(questions: Questions, tokens: Tokens) -> dict | None:
    """The figures of the answers to questions with choices, None without any."""
    if not questions.rows:
        return None
    answers = questions.answers(tokens, TEMPERATURES)
    counts = {"questions": len(questions.rows), "incomplete_questions": questions.incomplete}
    return counts | measure(answers, TEMPERATURES) | _curves(answers)


def _by_class(tokens: Tokens) -> dict[str, dict]:
    """The figures of each class of token that has enough of them to be sorted into bins."""
    found = {}
    for index, name in enumerate(KINDS):
        if (chosen := tokens.kind == index).sum() >= 30:
            part = tokens.of(chosen)
            found[name] = {"label_tokens": len(part.row)} | measure(part, TEMPERATURES)
    return found


def columns(evaluation: dict) -> dict[str, dict]:
    """Return the figures of each column by its title."""
    found = {title: evaluation[key] if key else evaluation for key, title in COLUMNS.items()}
    return {title: figures for title, figures in found.items() if figures is not None}


def table(evaluation: dict) -> str:
    """Return the figures as lines of a table, each with its interval."""
    parts = columns(evaluation)
    lines = _lines(parts)
    if evaluation["answers"] is not None:
        lines += _table_of_answers(parts)
    temperature = evaluation["after_temperature"]["fitted_temperature"]
    lines += [
        f"{evaluation['rows']:,} rows, {evaluation['label_tokens']:,} label tokens; in brackets what 95 % of "
        "resamples of rows lie in.",
        f"After T: T = {temperature:.3f}, fitted on half of the rows; the figures are those of the other half. "
        f"Unsmoothed: of label smoothing {evaluation['label_smoothing']:g}.",
    ]
    return "\n".join(lines)


def _table_of_answers(parts: dict[str, dict]) -> list[str]:
    """Of the columns that have answers: after a temperature of the tokens there are none."""
    answered = {title: figures["answers"] for title, figures in parts.items() if figures.get("answers")}
    counts = next(iter(answered.values()))
    lost = f"; {counts['incomplete_questions']:,} more have lost a choice" if counts["incomplete_questions"] else ""
    return [f"answers to {counts['questions']:,} questions with choices{lost}:", *_lines(answered)]


def _lines(parts: dict[str, dict]) -> list[str]:
    """The columns as lines."""
    lines = [" " * 12 + "".join(f"{title:>28}" for title in parts)]
    for key, name in [*SHOWN.items(), ("confidence_minus_accuracy", "conf - acc")]:
        cells = []
        for figures in parts.values():
            low, high = figures[f"{key}_interval"] or (float("nan"), float("nan"))
            cells.append(f"{figures[key]:>9.4f} [{low:.4f}, {high:.4f}]".rjust(28))
        lines.append(f"{name:<12}" + "".join(cells))
    return lines
