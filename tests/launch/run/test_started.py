"""The day of a run: that of its first start, whenever it is resumed."""

from datetime import date, timedelta

from launch.run.directory import open_run
from launch.run.started import first_day

FACTS = {"tp": 1, "data_parallel": 1, "zero": 1, "rows_a_step": 2, "data": "abc"}


def test_a_run_keeps_the_day_of_its_first_start(tmp_path):
    run, first = str(tmp_path / "run"), date.today() - timedelta(days=40)
    assert first_day(run) == date.today()
    open_run(run, {"learning_rate": 0.1}, None, FACTS, first)
    assert first_day(run) == first
    open_run(run, {"learning_rate": 0.1}, None, FACTS, date.today())
    assert first_day(run) == first


def test_a_new_run_or_a_damaged_file_means_today(tmp_path):
    (tmp_path / "started.txt").write_text("yesterday")
    assert first_day(None) == first_day(str(tmp_path)) == first_day("~nobody-of-this-name/x") == date.today()
