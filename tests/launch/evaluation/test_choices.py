"""Multiple-choice rows: which records they become, and the figures of answers against their definitions."""

import numpy as np
import pytest

from launch.common.errors import Reject
from launch.data.examples.columns import Columns
from launch.data.read import Source, Sources
from launch.data.records import Record, Rejected
from launch.evaluation.choices import Questions, choice_rows, with_choices
from launch.evaluation.figures import Tokens, measure

CHOICES = ["one", "two", "three"]
ARC = {"text": CHOICES, "label": ["1", "2", "3"]}


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [(CHOICES, 2, 2), (CHOICES, 0, 0), (CHOICES, "two", 1), (CHOICES, "C", 2), (ARC, "2", 1), (["B", "A"], "A", 1)],
)
def test_each_choice_is_the_answer_to_the_question(choices, answer, right):
    fields = {"question": "Which?", "choices": choices, "answer": answer, "system": "Be brief."}
    rows = choice_rows(fields, "a:1")
    texts = choices["text"] if isinstance(choices, dict) else choices
    assert [row.fields["answer"] for row in rows] == texts
    assert all(row.fields["question"] == "Which?" and row.fields["system"] == "Be brief." for row in rows)
    questions = Questions.of([row.where for row in rows])
    assert (questions.rows, questions.right, questions.kept.tolist()) == ([[*range(len(texts))]], [right], [right])


@pytest.mark.parametrize(
    ("choices", "answer"),
    [
        *((CHOICES, answer) for answer in (3, -1, "four", "D", True, None)),
        *((choices, 0) for choices in (["one"], "one", ["one", 2])),
        (["one", "one"], "one"),
    ],
)
def test_what_names_no_choice_is_refused(choices, answer):
    with pytest.raises(Reject):
        choice_rows({"question": "Which?", "choices": choices, "answer": answer}, "a:1")


def test_other_rows_pass_and_names_of_columns_are_read():
    bad, plain = Rejected("a:1", "broken"), Record({"prompt": "a", "completion": "b"}, "a:2")
    asked = Record({"q": "Which?", "options": CHOICES, "answer": 1}, "a:3")
    refused = Record({"q": "Which?", "options": CHOICES, "answer": 9}, "a:4")
    source = Source("a", lambda: iter([bad, plain, asked, refused]), lambda: "hash")
    columns = Columns({"question": "q", "choices": "options"})
    sources = with_choices(Sources([source], [], 0.0), columns).train[0]
    first, second, *rows, last = list(sources.records())
    assert (first, second) == (bad, plain) and len(rows) == 3
    assert isinstance(last, Rejected) and last.where == "a:4"
    assert columns.rename(rows[1].fields)["question"] == "Which?" and sources.fingerprint() != "hash"


def test_a_question_that_has_lost_a_choice_is_not_counted():
    places = ["a:1 choice 1 of 2", "a:1 choice 2 of 2 (the answer)", "a:2 choice 2 of 2 (the answer)", "a:3"]
    questions = Questions.of(places)
    assert (questions.rows, questions.right, questions.incomplete) == ([[0, 1]], [1], 1)
    assert questions.kept.tolist() == [1, 2, 3]  # the wrong choice alone is no row to learn from


def test_answers_are_the_softmax_of_sums_of_log_probabilities():
    draw = np.random.default_rng(0)
    count, choices = 200, 4
    places = [
        f"a:{q} choice {c + 1} of {choices}{' (the answer)' if c == q % choices else ''}"
        for q in range(count)
        for c in range(choices)
    ]
    row = np.repeat(np.arange(len(places)), draw.integers(1, 5, len(places)))
    nll = draw.exponential(size=len(row))
    zeros = np.zeros(len(row))
    tokens = Tokens(row, zeros.astype(int), nll, zeros, zeros, zeros, zeros, np.zeros((len(row), 3)))
    temperatures = (0.5, 1.0, 2.0)
    got = measure(Questions.of(places).answers(tokens, temperatures), temperatures)
    scores = np.array([-nll[row == index].sum() for index in range(len(places))]).reshape(count, choices)
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    right = np.arange(count) % choices
    one_hot = np.eye(choices)[right]
    assert got["accuracy"] == pytest.approx((p.argmax(1) == right).mean())
    assert got["confidence"] == pytest.approx(p.max(1).mean())
    assert got["brier"] == pytest.approx(((p - one_hot) ** 2).sum(1).mean())
    assert got["nll"] == pytest.approx(-np.log(p[np.arange(count), right]).mean())
    assert got["entropy"] == pytest.approx(-(p * np.log(p)).sum(1).mean())
    kept = np.argsort(-p.max(1), kind="stable")
    errors = np.cumsum((p.argmax(1) != right)[kept]) / np.arange(1, count + 1)
    assert got["aurc"] == pytest.approx(errors.mean())
