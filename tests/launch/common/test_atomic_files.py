"""A file of a run is the old one or the new one, whatever happens while it is written."""

import os

import pytest

from launch.common.atomic_files import write_whole


def test_written(tmp_path):
    write_whole(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_the_old_one_stands_until_the_new_one_is_on_disk(tmp_path, monkeypatch):
    def full(_):
        raise OSError("No space left on device")

    (tmp_path / "a.txt").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
