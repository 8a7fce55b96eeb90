"""Multiple-choice rows (`question`, `choices`, `answer`): each choice becomes a row, and the scores of all an answer.

A choice is rendered as the answer to its question, by the same template as any row. Its score is the sum of the
log-probabilities of its learned tokens, the stop among them; the softmax of a question's scores says how sure the
model is of each choice.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Any

import numpy as np

from launch.common.errors import Reject
from launch.data.examples.columns import Columns
from launch.data.examples.values import holds
from launch.data.read import Source, Sources
from launch.data.records import Record, Records, Rejected
from launch.evaluation.figures import Tokens

PLACE = re.compile(r"(?P<where>.*) choice (?P<choice>\d+) of (?P<choices>\d+)(?P<right> \(the answer\))?", re.DOTALL)


def with_choices(sources: Sources, columns: Columns) -> Sources:
    """Return sources whose multiple-choice rows are a row for each choice."""
    return replace(sources, train=[_expanding(source, columns) for source in sources.train])


def _expanding(source: Source, columns: Columns) -> Source:
    return replace(
        source,
        records=lambda: _expanded(source.records(), columns),
        fingerprint=lambda: f"{source.fingerprint()} choices",
    )


def _expanded(records: Records, columns: Columns) -> Records:
    for record in records:
        if not isinstance(record, Record):
            yield record
            continue
        try:
            fields = columns.rename(record.fields)
            asked = holds(fields.get("choices")) and holds(fields.get("question"))
            rows = choice_rows(fields, record.where) if asked else [record]
        except Reject as reject:
            yield Rejected.of(record.where, reject)
            continue
        yield from rows


def choice_rows(fields: Mapping[str, Any], where: str) -> list[Record]:
    """Return a question/answer record for each choice. Raises Reject for choices or an answer of another shape."""
    choices = fields["choices"]
    if isinstance(choices, dict):  # of text and label, as in ARC
        labels, choices = choices.get("label"), choices.get("text")
    else:
        labels = list(ascii_uppercase)
    if not isinstance(choices, list | tuple) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
        raise Reject("choices is not a list of two or more texts")
    right = _index(fields.get("answer"), list(choices), labels)
    rest = {name: fields[name] for name in fields if name not in ("choices", "answer")}
    of = len(choices)
    return [
        Record(
            rest | {"answer": choice},
            f"{where} choice {index + 1} of {of}{' (the answer)' if index == right else ''}",
        )
        for index, choice in enumerate(choices)
    ]


def _index(answer: Any, choices: list[str], labels: Any) -> int:
    """Which choice an answer names: by its number from 0, its text, or its letter."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    if isinstance(answer, str) and isinstance(labels, list) and answer in labels[: len(choices)]:
        return labels.index(answer)
    raise Reject("answer names none of the choices by its number from 0, its text, or its letter")


@dataclass(frozen=True)
class Questions:
    """The rows of each question whose choices are all there, and which of them is right.

    Attributes:
        rows: of each question, the indices of its choices' rows.
        right: of each question, the index in those.
        incomplete: how many questions have lost a choice, and are not counted.
        kept: the rows that count token by token: all but the wrong choices.
    """

    rows: list[list[int]]
    right: list[int]
    incomplete: int
    kept: np.ndarray

    @classmethod
    def of(cls, places: Sequence[str]) -> "Questions":
        """Find them by the `where` of each row."""
        found: dict[tuple[str, str], dict[int, int]] = {}
        right: dict[tuple[str, str], int] = {}
        kept = []
        for index, place in enumerate(places):
            choice = PLACE.fullmatch(place)
            if choice is None or choice["right"]:
                kept.append(index)
            if choice is not None:
                question = choice["where"], choice["choices"]
                found.setdefault(question, {})[int(choice["choice"])] = index
                if choice["right"]:
                    right[question] = int(choice["choice"]) - 1
        whole = {key: rows for key, rows in found.items() if len(rows) == int(key[1])}
        rows = [[rows[number] for number in sorted(rows)] for rows in whole.values()]
        return cls(rows, [right[key] for key in whole], len(found) - len(whole), np.array(kept, dtype=int))

    def answers(self, tokens: Tokens, temperatures: tuple[float, ...]) -> Tokens:
        """Return the numbers of each answer as if it were a token, whose vocabulary is the choices."""
        scores = -np.bincount(tokens.row, tokens.nll)
        made = [_answer(scores[rows], right, temperatures) for rows, right in zip(self.rows, self.right, strict=True)]
        nll, confidence, correct, entropy, sum_square = np.array([numbers for numbers, _ in made]).T
        each = np.arange(len(made))
        nll_at = np.stack([at for _, at in made])
        return Tokens(each, np.zeros_like(each), nll, confidence, correct, entropy, sum_square, nll_at)


def _answer(scores: np.ndarray, right: int, temperatures: tuple[float, ...]) -> tuple[list[float], np.ndarray]:
    log_p = _log_softmax(scores)
    p = np.exp(log_p)
    top = np.flatnonzero(np.isclose(p, p.max(), rtol=1e-9, atol=0))
    correct = float(right in top) / len(top)
    entropy = -float((p * np.where(p > 0, log_p, 0)).sum())
    at = np.array([-_log_softmax(scores / t)[right] for t in temperatures])
    return [-float(log_p[right]), float(p.max()), correct, entropy, float((p**2).sum())], at


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max()
    return z - np.log(np.exp(z).sum())
