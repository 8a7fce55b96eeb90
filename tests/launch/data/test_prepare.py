"""Preparation: the same file whatever the number of processes, rows that cannot be used, and the cache."""

import faulthandler
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from launch.common.errors import UserError
from launch.config.options import SftOptions
from launch.data import load, prepare, rows_file
from launch.data.encode import Encoder
from launch.data.encode_batch import BatchEncoder
from launch.data.load import load_data
from launch.data.prepared import ROWS, SUMMARY, Summary
from launch.data.read import batches, sources_of
from launch.data.records import DataError, Note, Record, Rejected
from launch.data.train_tokenizer import train_tokenizer
from tests.support.data import prepared


def abort() -> None:
    faulthandler.disable()  # pytest's, which would print the stack
    os.abort()


DEADLY = {51: abort, 130: lambda: os._exit(1)}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["0 1 2 3 4 5 6 7 8 9 + ="], 300)


@pytest.fixture
def source(tmp_path) -> str:
    """Rows of many lengths, some of which cannot be used."""
    lines = [json.dumps({"prompt": "1 + " * (n % 90) + "=", "completion": f" {n}" * (n % 7)}) for n in range(400)]
    lines[33] = "{"
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def written(source: str, folder: Path, tokenizer, workers: int, encode=None) -> tuple[bytes, Summary]:
    folder.mkdir()
    encoder = BatchEncoder(tokenizer, encode or Encoder(tokenizer, 200))
    prepare.prepare(sources_of([source]), encoder, folder, workers)
    return (folder / ROWS).read_bytes(), Summary.from_json((folder / SUMMARY).read_text())


def test_the_file_does_not_depend_on_processes_and_batches(tmp_path, tokenizer, source, monkeypatch):
    monkeypatch.setattr(rows_file, "ROWS_A_BATCH", 70)
    rows, summary = written(source, tmp_path / "0", tokenizer, 0)
    assert {7 * 3, 33} <= {int(r.where.rpartition(":")[2]) - 1 for r in summary.report.rejections}
    assert summary.report.truncated
    for count in (1, 3):
        again, other = written(source, tmp_path / str(count), tokenizer, count)
        assert again == rows
        assert json.loads(other.to_json()) | {"prepared": ""} == json.loads(summary.to_json()) | {"prepared": ""}
    monkeypatch.setattr("launch.data.read.ROWS_A_BATCH", 7)
    assert written(source, tmp_path / "small", tokenizer, 2)[0] == rows


def test_a_row_that_ends_a_process_is_dropped_with_the_reason(tmp_path, tokenizer, source):
    """As a panic in a tokenizer does, or the machine's last memory."""

    class Deadly(Encoder):
        def begin(self, example):
            DEADLY.get(int(example.where.rpartition(":")[2]), lambda: None)()
            return super().begin(example)

    _, before = written(source, tmp_path / "plain", tokenizer, 0)
    _, summary = written(source, tmp_path / "deadly", tokenizer, 2, Deadly(tokenizer, 200))
    lost = [r for r in summary.report.rejections if r not in before.report.rejections]
    assert [(r.where, r.detail) for r in lost] == [
        (f"{source}:51", "ended by SIGABRT"),
        (f"{source}:130", "ended with exit code 1"),
    ]
    assert summary.sources[0][1] == before.sources[0][1] - 2


class PanicException(BaseException):
    """As a panic in Rust becomes."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [(PanicException("index out of bounds"), "cannot be encoded"), (MemoryError(), "needs more memory than")],
)
def test_what_is_no_exception_costs_its_row(tmp_path, tokenizer, source, error, reason):
    class Panics(Encoder):
        def begin(self, example):
            if example.where.endswith(":2"):
                raise error
            return super().begin(example)

    _, summary = written(source, tmp_path / "x", tokenizer, 0, Panics(tokenizer, 200))
    assert [r.where for r in summary.report.rejections if r.reason.startswith(reason)] == [f"{source}:2"]


def test_the_first_unusable_row_is_named_with_strict(tmp_path, tokenizer, source):
    for workers in (0, 2):
        with pytest.raises(DataError, match=rf"^{source}:1: "):
            prepared(source, tokenizer, strict=True, workers=workers)


def test_records_are_read_in_batches_of_bounded_size():
    def records():
        yield Note("n")
        for number in range(200):
            yield Record({"messages": [{"content": "x" * 10**6}]}, "a") if number < 10 else Rejected("a", "b")
        raise DataError("the rest is damaged")

    sizes = []
    with pytest.raises(DataError, match="damaged"):
        for batch in batches(records()):
            sizes.append(len(batch))
    assert sizes[:2] == [6, 5] and max(sizes) <= 64 and sum(sizes) == 201


@pytest.fixture
def counted(monkeypatch):
    """How often rows were prepared."""
    calls = []

    def counting(*args, **kwargs):
        calls.append(args)
        return prepare.prepare(*args, **kwargs)

    monkeypatch.setattr(load, "prepare", counting)
    return calls


def options(source, tmp_path, **values):
    return SftOptions(data=source, data_cache=str(tmp_path / "cache"), tokenizer_size=300, data_workers=0, **values)


def test_rows_are_prepared_once(source, tmp_path, counted, capsys):
    first = load_data(options(source, tmp_path))[1]
    assert "from the cache" not in capsys.readouterr().out
    again = load_data(options(source, tmp_path))[1]
    assert len(counted) == 1 and "from the cache, prepared 20" in capsys.readouterr().out
    assert again.train[:] == first.train[:] and again.heldout[:] == first.heldout[:]
    assert again.summary == first.summary


CHANGES = {
    "max_length": {"max_length": 100},
    "eval_fraction": {"eval_fraction": 0.2},
    "tokenizer_size": {"tokenizer_size": 274},
    "max_rows": {"max_rows": 30},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_rows_are_prepared_anew_for_another_option(source, tmp_path, counted, change, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    # a tokenizer trained on the data may change with the option too, and hide that it is forgotten
    model = {} if "tokenizer_size" in change else {"model": str(tmp_path / "model")}
    for more in ({}, change):
        changed = options(source, tmp_path)
        vars(changed).update(model | more)
        load_data(changed)
    assert len(counted) == 2


def test_rows_are_prepared_anew_from_another_file(source, tmp_path, counted):
    load_data(options(source, tmp_path))
    path = Path(source)
    path.write_text(path.read_text().replace(" 398", " 397"))
    load_data(options(source, tmp_path))
    assert len(counted) == 2


def damaged(file: str, change):
    def damage(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(change(content))

    return damage


DAMAGE = {
    "rows cut off": damaged(ROWS, lambda content: content[:-100]),
    "a byte of the rows": damaged(ROWS, lambda content: content[:3000] + b"?" + content[3001:]),
    "no rows": lambda folder: (folder / ROWS).unlink(),
    "no summary": lambda folder: (folder / SUMMARY).unlink(),
    "summary cut off": damaged(SUMMARY, lambda content: content[:-100]),
    "summary of another version": damaged(SUMMARY, lambda content: b'{"prepared": "x"}'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_made_again(source, tmp_path, counted, damage, capsys):
    first = load_data(options(source, tmp_path))[1].train[:]
    (summary,) = (tmp_path / "cache").glob(f"*/{SUMMARY}")
    damage(summary.parent)
    assert load_data(options(source, tmp_path))[1].train[:] == first
    assert len(counted) == 2 and "is damaged" in capsys.readouterr().out


def test_nothing_is_kept_of_a_preparation_that_failed(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(load, "prepare", lambda *args, **kwargs: 1 / 0)
        load_data(options(source, tmp_path))
    assert not list((tmp_path / "cache").glob(f"*/{SUMMARY}")) and not list((tmp_path / "cache").glob("*.partial"))
    load_data(options(source, tmp_path))


@pytest.mark.parametrize("cache", ["file", "file/in", "~nobody-of-this-name/cache"])
def test_a_cache_that_cannot_be_written_names_the_flag(source, tmp_path, cache):
    (tmp_path / "file").write_text("")
    cache = cache if cache.startswith("~") else str(tmp_path / cache)
    with pytest.raises(UserError, match="--data_cache"):
        load_data(replace(options(source, tmp_path), data_cache=cache))


def test_strict_holds_for_the_cache_too(source, tmp_path):
    load_data(options(source, tmp_path))
    with pytest.raises(DataError, match=rf"^{source}:1: "):
        load_data(options(source, tmp_path, strict=True))


def test_several_sources_are_concatenated_and_counted(source, tmp_path, tokenizer, capsys):
    other = tmp_path / "b.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"{n} +", "completion": " 1"}) + "\n" for n in range(100)))
    tokenizer.save_pretrained(tmp_path / "model")
    flags = {"model": str(tmp_path / "model"), "data_cache": str(tmp_path / "cache"), "data_workers": 2}
    _, data = load_data(SftOptions(data=[source, str(other)], data_weights=[1.0, 3.0], **flags))
    first, second = data.sources
    assert len(first) + len(second) == len(data.train) == 341 + 100 - len(data.heldout)
    for rows, name in ((first, source), (second, str(other))):
        assert {data.train[row]["where"].rpartition(":")[0] for row in rows} == {name}
    assert f"  {round(len(data.train) * 0.75)} of {other}, which has {len(second)}" in capsys.readouterr().out
    with pytest.raises(DataError, match=f"{other} has so small a weight that no row of it is in an epoch of "):
        load_data(SftOptions(data=[source, str(other)], data_weights=[1.0, 1e-9], **flags))
    plain = load_data(SftOptions(data=[source, str(other)], eval_data=str(other), **flags))[1]
    assert f"--eval_data {other} is trained on too" in capsys.readouterr().out
    plain = load_data(SftOptions(data=[source, str(other)], **flags))[1]
    assert plain.train[:] == data.train[:] and plain.digest != data.digest
    assert f"{len(second)} rows of {other}" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 3])
def test_max_rows_takes_the_first_usable_rows_of_each_source(source, tmp_path, tokenizer, workers):
    """Whatever has been read ahead: neither rows nor rejections behind them count."""
    data = prepared(source, tokenizer, fraction=0.0, max_rows=100, workers=workers)
    assert data.train["where"][:] == prepared(source, tokenizer, fraction=0.0).train["where"][:100]
    last = int(data.train["where"][-1].rpartition(":")[2])
    assert max(int(r.where.rpartition(":")[2]) for r in data.report.rejections) < last
    assert [note for note in data.report.left_out if "--max_rows" in note]


@pytest.mark.parametrize(("share", "stops"), [(0.0, True), (0.14, True), (0.15, False), (1.0, False)])
def test_too_many_dropped_rows_stop_the_run(source, tmp_path, share, stops):
    """59 of 400 rows cannot be used. What was prepared is kept for the run with a higher limit."""
    if not stops:
        load_data(options(source, tmp_path, max_dropped=share))
        return
    with pytest.raises(DataError, match=r"(?s)59 of 400 rows .*--max_dropped.*58 x empty completion"):
        load_data(options(source, tmp_path, max_dropped=share))
    assert list((tmp_path / "cache").glob(f"*/{SUMMARY}"))


def test_lengths_are_told(source, tmp_path, capsys):
    load_data(options(source, tmp_path, max_length=100))
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "lengths:" in line]
    assert "longest 100 tokens" in line and "% of tokens are learned; --max_length 100 dropped 0 rows" in line
    assert not line.endswith(" 0")
