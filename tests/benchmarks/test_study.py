"""The study of `make study`: who gets which rows, which arms a run has, and what is held to what."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.study.__main__ import arguments, check_same_study
from benchmarks.study.design import STUDY, Cell, Design, Treatment, rows_of, rows_problem, swap_answers
from benchmarks.study.figures import BEST_EPOCH, TEMPERATURE, UNSMOOTHED, Resampling, arms_of, figures_of
from benchmarks.study.measured import Measured
from benchmarks.study.table import document
from launch.evaluation.figures import Tokens
from launch.evaluation.report import TEMPERATURES

RECORDS = [{"question": f"q{index}", "answer": f"a{index}"} for index in range(400)]
PLAIN, SMOOTHED = Treatment(0.0), Treatment(0.1)
SMALL = Design((PLAIN, SMOOTHED), seeds=2, rows=4, held_out=12, epochs=(1, 2), flags=())


def test_every_treatment_of_a_seed_has_its_rows_and_another_seed_has_others():
    def questions(cell: Cell) -> list[str]:
        return [row["question"] for row in rows_of(RECORDS, cell, STUDY)]

    first = questions(Cell(PLAIN, 0))
    assert len(set(first)) == STUDY.rows
    assert questions(Cell(Treatment(0.1, noise=0.4), 0)) == first != questions(Cell(PLAIN, 1))


def test_rows_that_no_study_can_be_made_of():
    assert rows_problem(RECORDS, RECORDS, STUDY) is None
    assert "smaller --rows and --held_out" in rows_problem(RECORDS[:9], RECORDS, STUDY)
    assert "smaller --rows and --held_out" in rows_problem(RECORDS, RECORDS[:9], STUDY)
    assert "columns answer" in rows_problem([{"text": "a"}] * 400, RECORDS, STUDY)


def test_a_folder_of_another_study_is_refused(tmp_path):
    args = SimpleNamespace(folder=tmp_path, data="a", eval_data="b", model=None)
    check_same_study(args, STUDY)
    check_same_study(args, replace(STUDY, seeds=STUDY.seeds + 1))
    with pytest.raises(SystemExit, match="name another --folder"):
        check_same_study(args, replace(STUDY, rows=7))


@pytest.mark.parametrize("flag", ["--rows", "--seeds", "--held_out", "--at_once"])
def test_a_number_below_1_is_refused(flag, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["study", flag, "0"])
    with pytest.raises(SystemExit):
        arguments()
    assert f"{flag} must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_swapped_answers_are_those_of_other_rows(share):
    rows = [dict(record) for record in RECORDS[:50]]
    swap_answers(rows, share, random.Random(0))
    wrong = [row for row in rows if row["answer"][1:] != row["question"][1:]]
    assert len(wrong) == share * 50
    assert sorted(row["answer"] for row in rows) == sorted(record["answer"] for record in RECORDS[:50])


def tokens(nll: float, rows: int = 6) -> Tokens:
    count = rows * 40
    draw = np.random.default_rng(round(nll * 100))
    columns = {name: draw.random(count) for name in ("confidence", "correct", "entropy", "sum_square")}
    columns |= {"nll": np.full(count, nll), "nll_at": draw.random((count, len(TEMPERATURES)))}
    return Tokens(row=np.arange(count) % rows, kind=np.zeros(count, dtype=int), **columns)


def write(folder, treatment: Treatment, seed: int, epoch: int, even: float, odd: float) -> None:
    run = folder / Cell(treatment, seed).folder
    run.mkdir(exist_ok=True)
    Measured(tokens(even), tokens(odd), tokens(odd + 0.5), tokens(odd + 1), 1.5).write(run / Measured.file(epoch))


@pytest.fixture
def measured(tmp_path):
    for seed in range(SMALL.seeds):
        write(tmp_path, PLAIN, seed, 0, 3.0, 3.0)
        for treatment, odd in ((PLAIN, 1.0), (SMOOTHED, 1.2)):
            write(tmp_path, treatment, seed, 1, 0.5, odd + 0.25)  # best by the rows that choose, not by the others
            write(tmp_path, treatment, seed, 2, 0.6, odd + 0.1 * seed)
    return tmp_path


def test_an_epoch_is_chosen_by_other_rows_than_it_is_measured_on(measured):
    arms = {arm.remedy: arm for arm in arms_of(SMOOTHED, SMALL, measured)}
    assert [one.nll.mean() for one in arms[BEST_EPOCH].tokens] == pytest.approx([1.45, 1.45])
    assert [one.nll.mean() for one in arms[UNSMOOTHED].tokens] == pytest.approx([1.7, 1.8])
    assert [one.nll.mean() for one in arms[TEMPERATURE].tokens] == pytest.approx([2.2, 2.3])
    assert UNSMOOTHED not in {arm.remedy for arm in arms_of(PLAIN, SMALL, measured)}


def test_arms_are_held_to_plain_training_in_pairs(measured):
    figures = figures_of(SMALL, measured)
    assert figures["base"]["nll"] == pytest.approx(3.0)
    plain, smoothed = (next(arm for arm in figures["arms"] if arm["smoothing"] == of) for of in (0.0, 0.1))
    assert plain["nll"] == pytest.approx(1.05) and plain["minus_plain"]["nll_interval"] == [0, 0]
    assert plain["nll_interval"] == pytest.approx([1.0, 1.1])  # both seeds differ by 0.1, their rows by nothing
    assert smoothed["minus_plain"]["nll_interval"] == pytest.approx([0.2, 0.2])
    assert all(
        f"{arm['treatment']}, {arm['remedy']}" in document({"base_model": "b", **figures}, SMALL, "here")
        for arm in figures["arms"]
    )


def test_resamples_draw_seeds_and_rows():
    one, other = tokens(1.0), replace(tokens(1.0), nll=tokens(1.0).row.astype(float))
    values = Resampling(6, 2).of([one, other])["nll"]
    assert values[0] == pytest.approx((1.0 + 2.5) / 2)
    assert 1.0 in values  # the first seed twice
    assert len(np.unique(values)) > 10  # rows of the other
