"""Whatever a file holds, the user gets a DataError or a counted rejection with file:line."""

import gzip
import json
import os
import pickle
import random

import pyarrow
import pyarrow.parquet
import pytest

from launch.common.errors import Reject
from launch.data.prepared import EncodedData
from launch.data.records import DataError, DropReport
from launch.data.sources import csv_files
from launch.data.sources.compression import SUFFIXES
from launch.data.sources.files import iter_records, source_fingerprint
from launch.data.train_tokenizer import train_tokenizer
from launch.process.ranks import say
from tests.support.data import prepared
from tests.support.records import read_records

GOOD = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words to learn from, in a sentence\n"] * 5, 300)


def load(path: str, tokenizer, max_length: int = 512, strict: bool = False) -> EncodedData:
    return prepared(path, tokenizer, max_length, strict)


def row(**fields) -> bytes:
    return json.dumps(fields).encode() + b"\n"


BAD_LINES = {
    "broken JSON": (b'{"prompt": "a", \n', "broken JSON"),
    "extra data": (b'{"prompt": "a", "completion": "b"} x\n', "broken JSON"),
    "NaN": (b'{"prompt": NaN, "completion": "b"}\n', "broken JSON"),
    "nested too deeply": (b"[" * 100_000 + b"\n", "broken JSON"),
    "huge number": (b'{"prompt": ' + b"9" * 5000 + b"}\n", "broken JSON"),
    "a list": (b"[1, 2]\n", "not a JSON object"),
    "a string": (b'"text"\n', "not a JSON object"),
    "not UTF-8": (b'{"prompt": "\xff", "completion": "b"}\n', "not UTF-8"),
    "null bytes": (b'{"prompt": "\0", "completion": "b"}\n', "null bytes"),
    "duplicate keys": (b'{"prompt": "a", "prompt": "c", "completion": "b"}\n', "duplicate keys"),
    "duplicate keys inside": (b'{"messages": [{"role": "user", "role": "tool"}]}\n', "duplicate keys"),
    "unrecognised": (row(body="b"), "unrecognised fields"),
    "no fields": (b"{}\n", "unrecognised fields"),
    "missing completion": (row(prompt="a"), "unrecognised fields"),
    "null completion": (row(prompt="a", completion=None), "completion is not text"),
    "prompt a number": (row(prompt=1, completion="b"), "prompt is not text"),
    "completion a list": (row(prompt="a", completion=["b"]), "a message is not {role, content}"),
    "empty completion": (row(prompt="a", completion=""), "empty completion"),
    "blank completion": (row(prompt="a", completion=" \n"), "empty completion"),
    "blank answer": (row(question="a", answer=" "), "empty answer"),
    "blank output": (row(instruction="a", output=""), "empty output"),
    "input a number": (row(instruction="a", input=3, output="b"), "input is not text"),
    "half a surrogate pair": (row(prompt="\ud800", completion="b"), "prompt holds half a surrogate pair"),
    "end token inside": (
        row(prompt="a", completion="b</s>c"),
        "completion holds the end token before its end",
    ),
    "only an end token": (row(prompt="a", completion="</s>"), "completion has no tokens"),
    "too long": (row(prompt="a", completion="zq" * 99), "completion longer than max_length 64"),
    "messages no list": (row(messages="hi"), "messages is text, but not JSON"),
    "messages empty": (row(messages=[]), "messages is not a list of messages"),
    "message a string": (row(messages=["hi"]), "a message is not {role, content}"),
    "message without content": (row(messages=[{"role": "user"}]), "a message is not {role, content}"),
    "unknown role": (row(messages=[{"role": "narrator", "content": "x"}]), "unknown role"),
    "role a list": (row(messages=[{"role": [], "content": "x"}]), "unknown role"),
    "content null": (row(messages=[{"role": "assistant", "content": None}]), "a message is not {role, content}"),
    "empty assistant": (row(messages=[{"role": "assistant", "content": ""}]), "empty assistant message"),
    "no answer": (row(messages=[{"role": "user", "content": "x"}]), "no assistant message"),
    "ids as text": (row(input_ids="[1, 2]", labels=[1, 2]), "input_ids is not a list of integers"),
    "ids as booleans": (row(input_ids=[True, 2], labels=[1, 2]), "input_ids is not a list of integers"),
    "ids outside": (row(input_ids=[1, 10**9], labels=[-100, 10**9]), "input_ids outside [0, 300)"),
    "ids negative": (row(input_ids=[1, -1], labels=[-100, -1]), "input_ids outside [0, 300)"),
    "lengths differ": (row(input_ids=[1, 2], labels=[2]), "input_ids and labels differ in length"),
    "no label": (row(input_ids=[5, 6], labels=[-100, -100]), "no label tokens"),
    "label only at 0": (row(input_ids=[5, 6], labels=[5, -100]), "no label tokens"),
    "labels shifted": (
        row(input_ids=[5, 6], labels=[6, -100]),
        "labels are neither -100 nor the input id at their position (shifted already?)",
    ),
    "ids too long": (row(input_ids=[5] * 65, labels=[5] * 65), "row longer than max_length 64"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line_is_counted_with_its_place(tmp_path, tokenizer, line, reason):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + b"\r\n" + line + GOOD)
    data = prepared(str(path), tokenizer, 64)
    assert data.train["where"][:] == [f"{path}:1", f"{path}:4"]
    assert [(r.where, r.reason) for r in data.report.rejections] == [(f"{path}:3", reason)]
    assert data.report.counts() == {reason: 1}
    assert f"1 x {reason}: {path}:3" in data.report.summary()


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_strict_names_the_bad_line(tmp_path, tokenizer, line, reason):
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD + line)
    with pytest.raises(DataError) as caught:
        load(str(path), tokenizer, 64, strict=True)
    assert str(caught.value).startswith(f"{path}:2: {reason}")


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_nothing_but_bad_lines_is_an_error(tmp_path, tokenizer, line, reason):
    path = tmp_path / "data.jsonl"
    path.write_bytes(line)
    with pytest.raises(DataError, match=r"No training rows are left|No format is recognised"):
        load(str(path), tokenizer, 64)


def test_a_line_that_never_ends_is_passed_over(tmp_path):
    """70 MiB, from 70 KiB of gzip."""
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD + b'{"prompt": "' + b"a" * (70 << 20) + b'"}\n' + GOOD))
    report = DropReport()
    assert [record.where for record in read_records(str(path), report)] == [f"{path}:1", f"{path}:3"]
    assert [str(r) for r in report.rejections] == [f"{path}:2: line too long (more than 64 MiB)"]


ENDLESS = {"a line": ("x" * 2000 + ",y\n", ["b", "d"]), "many lines": ('"' + "x\n" * 1000 + '",y\n', ["b"])}


@pytest.mark.parametrize(("row", "kept"), ENDLESS.values(), ids=ENDLESS)
def test_a_csv_row_that_never_ends_is_passed_over(tmp_path, monkeypatch, row, kept):
    monkeypatch.setattr(csv_files, "LONGEST_ROW", 1000)
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,completion\na,b\n{row}c,d\n")
    report = DropReport()
    assert [record.fields["completion"] for record in read_records(str(path), report)] == kept
    assert (report.rejections[0].where, report.rejections[0].reason) == (f"{path}:3", "row too long")


BAD_FILES = {
    "empty": ("a.jsonl", b""),
    "blank lines": ("a.jsonl", b"\n \r\n\n"),
    "a picture": ("a.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(range(256))),
    "control bytes": ("a.json", bytes(range(32)) * 10),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16")),
    "not gzip": ("a.jsonl.gz", GOOD),
    "not zstd": ("a.csv.zst", GOOD),
    "a picture in gzip": ("a.jsonl.gz", gzip.compress(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))),
    "nothing in gzip": ("a.jsonl.gz", gzip.compress(b"")),
    "unknown kind": ("a.txt", GOOD),
    "no suffix": ("a", GOOD),
    "JSON a number": ("a.json", b"3"),
    "JSON blank": ("a.json", b"  \n"),
    "JSON empty list": ("a.json", b"[]"),
    "JSON not UTF-8": ("a.json", b'["\xff"]'),
    "JSON cut": ("a.json", b"["),
    "Parquet garbage": ("a.parquet", b"PAR1 but no more"),
    "Parquet text": ("a.parquet", GOOD),
    "CSV header only": ("a.csv", b"prompt,completion\n"),
    "CSV header twice": ("a.csv", b"prompt,prompt\na,b\n"),
    "CSV header unnamed": ("a.csv", b"prompt,\na,b\n"),
    "CSV blank": ("a.csv", b"\n\n"),
}


@pytest.mark.parametrize(("name", "content"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file_is_an_error_that_names_it(tmp_path, tokenizer, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(str(path), tokenizer)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/place", "", " ", "a\0b", "x" * 5000])
def test_missing_source_is_an_error(name):
    with pytest.raises(DataError):
        read_records(name, DropReport())


def test_directory_without_data_is_an_error(tmp_path):
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(DataError, match="holds none"):
        read_records(str(tmp_path), DropReport())


def test_unusable_file_of_a_directory_is_counted_and_strict_names_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.parquet").write_bytes(GOOD)
    report = DropReport()
    assert len(read_records(str(tmp_path), report)) == 1
    assert [(r.where, r.reason) for r in report.rejections] == [(f"{tmp_path}/b.parquet:1", "unusable file")]
    with pytest.raises(DataError, match=r"b\.parquet"):
        read_records(str(tmp_path), DropReport(), strict=True)


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


CUT = {
    "before its last bytes": lambda size: size - 9,
    "in the middle": lambda size: size // 2,
    "early": lambda size: 9,
}


@pytest.mark.parametrize("cut", CUT.values(), ids=CUT)
@pytest.mark.parametrize("compress", [gzip.compress, zstd], ids=["gzip", "zstd"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_what_precedes_damage_in_a_compressed_file_is_read(tmp_path, kind, compress, cut):
    noise = random.Random(0)
    texts = [str(noise.getrandbits(4000)) for _ in range(500)]
    if kind == "csv":
        lines = ["prompt,completion", *(f'{number},"{text}"' for number, text in enumerate(texts))]
    else:
        lines = [json.dumps({"prompt": str(number), "completion": text}) for number, text in enumerate(texts)]
    if kind == "json":
        lines = ["[", *(f"{line}," for line in lines[:-1]), lines[-1], "]"]
    content = compress("\n".join(lines).encode())
    path = tmp_path / f"a.{kind}.{'gz' if compress is gzip.compress else 'zst'}"
    path.write_bytes(content[: cut(len(content))])
    report = DropReport()
    records = read_records(str(path), report)
    (rejected,) = report.rejections
    assert rejected.reason == f"damaged {SUFFIXES[path.suffix]}, the rest of the file is lost"
    assert [record.fields["completion"] for record in records] == texts[: len(records)]
    before = 0 if kind == "jsonl" or not records else 1  # a line of its own for the header, or the bracket
    wheres = [f"{path}:{len(records) + before + more}" for more in (1, 0)]
    assert rejected.where in wheres[: 1 + (kind == "json")]  # the line break after a JSON item may be lost
    share = len(records) / len(texts)
    assert {9: share == 0, len(content) // 2: 0.2 < share < 0.6}.get(cut(len(content)), share > 0.6)


CSV_ROWS = {
    "too few columns": (b"a\n", "wrong number of columns"),
    "too many columns": (b"a,b,c\n", "wrong number of columns"),
    "not UTF-8": (b"\xff,b\n", "not UTF-8"),
    "null bytes": (b"a\0,b\n", "null bytes"),
    "text after a quote": (b'"a"x,b\n', "broken CSV"),
}


@pytest.mark.parametrize(("line", "reason"), CSV_ROWS.values(), ids=CSV_ROWS)
def test_bad_csv_row_is_counted(tmp_path, line, reason):
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,completion\n"two\nlines",x\n' + line + b"p,q\n")
    report = DropReport()
    records = read_records(str(path), report)
    assert [record.where for record in records] == [f"{path}:2", f"{path}:5"]
    assert [(r.where, r.reason) for r in report.rejections] == [(f"{path}:4", reason)]


QUOTES = {
    "in its first line": (b'"c,d\n' + b"e,f\n" * 499, "a quote opened at line 3 is never closed: 500 lines are lost"),
    "in a later line": (b'"c\nd","e\n\nf', "a quote opened at line 4 is never closed: 4 lines are lost with it"),
    "at the end": (b'c,"', "a quote opened at line 3 is never closed: 1 line is lost with it"),
    "doubled": (b'"c ""d"" e\r\n', "a quote opened at line 3 is never closed: 1 line is lost with it"),
    "closed by another": (b'"c,d\ne,f\n"g,h\n', "',' expected after '\"', line 5: 3 lines are lost with it"),
}


@pytest.mark.parametrize(("lines", "detail"), QUOTES.values(), ids=QUOTES)
def test_csv_quote_that_is_not_closed(tmp_path, lines, detail):
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\na,b\n" + lines)
    report = DropReport()
    assert len(read_records(str(path), report)) == 1
    (rejected,) = report.rejections
    assert (rejected.where, rejected.reason) == (f"{path}:3", "broken CSV")
    assert rejected.detail.startswith(detail)


JSON_LISTS = {
    "NaN in one item": (b'[\n{"a": 1},\n{"a": NaN},\n{"a": 3}]', [2, 4], 3),
    "duplicate keys": (b'[\n{"a": 1},\n{"a": 1, "a": 2},\n{"a": 3}]', [2, 4], 3),
    "a number among objects": (b'[\n{"a": 1},\n7,\n{"a": 3}]', [2, 4], 3),
    "a missing comma": (b'[\n{"a": 1},\n{"a": 2}\n{"a": 3}]', [2], 3),
    "cut": (b'[\n{"a": 1},\n{"a": ', [2], 3),
    "more after the list": (b'[\n{"a": 1}\n] x', [2], 3),
    "not UTF-8 in one item": (b'[\n{"a": 1},\n{"a": "\xff"},\n{"a": 3}]', [2, 4], 3),
    "an item over lines": (b'[\n{"a": 1},\n{"a":\n2,\n"a": 2},{"a": 3},\n{"a":\n3}]', [2, 5, 6], 3),
}


@pytest.mark.parametrize(("content", "kept", "dropped"), JSON_LISTS.values(), ids=JSON_LISTS)
def test_json_list_names_lines(tmp_path, content, kept, dropped):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    report = DropReport()
    records = read_records(str(path), report)
    assert [record.where for record in records] == [f"{path}:{line}" for line in kept]
    assert [r.where for r in report.rejections] == [f"{path}:{dropped}"]


def test_parquet_with_two_columns_of_one_name(tmp_path):
    path = tmp_path / "a.parquet"
    columns = [pyarrow.array([text]) for text in "abc"]
    pyarrow.parquet.write_table(pyarrow.table(columns, ["prompt", "completion", "prompt"]), path)
    with pytest.raises(DataError, match=r"a\.parquet has two columns named 'prompt'"):
        read_records(str(path), DropReport())


@pytest.mark.parametrize("compress", [gzip.compress, zstd], ids=["gzip", "zstd"])
def test_compressed_parquet_is_named(tmp_path, compress):
    path = tmp_path / "a.parquet"
    path.write_bytes(compress(GOOD))
    with pytest.raises(DataError, match=r"holds (gzip|zstd); unpack it"):
        read_records(str(path), DropReport())


def test_parquet_with_null_and_number(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    rows = [{"prompt": "a", "completion": None}, {"prompt": "a", "completion": "b"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    data = load(str(path), tokenizer)
    assert data.train["where"][:] == [f"{path}:2"]
    assert data.report.counts() == {"completion is not text": 1}


BUILDERS = ["json", "text", "csv", "pandas", "parquet", "arrow", "imagefolder", "webdataset", "Json", "json:train"]


@pytest.mark.parametrize("name", BUILDERS)
def test_a_builder_of_datasets_is_no_data(tmp_path, monkeypatch, name):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "a.txt").write_bytes(GOOD)
    monkeypatch.chdir(tmp_path)
    for read in (iter_records, source_fingerprint):
        with pytest.raises(DataError, match="is a kind of file, not a data set"):
            read(name)


def test_a_split_of_a_local_directory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "train.txt").write_bytes(GOOD)
    monkeypatch.chdir(tmp_path)
    for source in ("here:train", "here@main"):
        with pytest.raises(DataError, match="'here' is local"):
            iter_records(source)


def test_a_panic_of_the_hub_client_is_an_error(monkeypatch):
    import datasets

    class PanicException(BaseException):  # what pyo3 raises has no public name
        pass

    def load(name, config, revision):
        raise {"panics": PanicException, "stops": KeyboardInterrupt}[name]

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    with pytest.raises(DataError, match="PanicException"):
        read_records("panics", DropReport())
    with pytest.raises(KeyboardInterrupt):
        read_records("stops", DropReport())


def test_a_saved_data_set_that_lacks_a_file(tmp_path):
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_list([{"prompt": "a"}] * 9).save_to_disk(folder, num_shards=2)
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"cannot be loaded .*; save it again"):
        read_records(str(folder), DropReport())
    (folder / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"holds none \(not read: data-00000-of-00002\.arrow\)"):
        read_records(str(folder), DropReport())


def test_half_a_character_can_be_shown(tmp_path, tokenizer, capsysbinary):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b'{"\\ud800": 1}\n')
    data = load(str(path), tokenizer)
    say(data.report.summary())
    assert rb"\ud800" in capsysbinary.readouterr().out


def test_a_file_name_that_is_not_utf8(tmp_path, tokenizer):
    path = os.fsencode(tmp_path) + b"/bad\xff.jsonl"
    with open(path, "wb") as file:
        file.write(GOOD * 2)
    data = load(os.fsdecode(path), tokenizer)
    assert data.train["where"][0].endswith(r"bad\udcff.jsonl:1")


def past_all_calendars(kind) -> pyarrow.Array:
    days = kind == pyarrow.date32()
    return pyarrow.array([0, 2**31 - 1 if days else 2**62], pyarrow.int32() if days else pyarrow.int64()).view(kind)


TIMES = [pyarrow.date32(), pyarrow.timestamp("ms"), pyarrow.duration("s")]


@pytest.mark.parametrize("kind", TIMES, ids=str)
def test_a_column_that_python_cannot_hold_costs_nothing_unless_it_is_used(tmp_path, tokenizer, kind):
    path = tmp_path / "a.parquet"
    table = {"prompt": ["a", "c"], "completion": ["b", "d"], "when": past_all_calendars(kind)}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    assert load(str(path), tokenizer, strict=True).train["where"][:] == [f"{path}:1", f"{path}:2"]
    first, second = read_records(str(path), DropReport())
    first.fields["when"]
    for record in (second, pickle.loads(pickle.dumps(second))):
        assert set(record.fields) == set(table) and record.fields["completion"] == "d"
        with pytest.raises(Reject, match="when cannot be read"):
            record.fields["when"]


@pytest.mark.parametrize("kind", TIMES, ids=str)
def test_a_value_that_python_cannot_hold_loses_its_row_where_it_is_used(tmp_path, tokenizer, kind):
    path = tmp_path / "a.parquet"
    table = {"prompt": ["a", "c"], "completion": past_all_calendars(kind)}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    with pytest.raises(DataError, match=r"1 x completion cannot be read: .*a\.parquet:2"):
        prepared(str(path), tokenizer)


def test_damage_inside_parquet_loses_the_rest_of_its_row_group(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"prompt": str(number * 7919), "completion": str(number)} for number in range(30)]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), path, row_group_size=10, use_dictionary=False, compression="gzip"
    )
    with pyarrow.parquet.ParquetFile(path) as file:
        at = file.metadata.row_group(1).column(1).data_page_offset
    content = bytearray(path.read_bytes())
    content[at : at + 40] = b"\xff" * 40
    path.write_bytes(content)
    report = DropReport()
    records = read_records(str(path), report)
    assert [record.fields["completion"] for record in records] == [str(n) for n in (*range(10), *range(20, 30))]
    assert records[-1].where == f"{path}:30"
    (rejected,) = report.rejections
    assert rejected.where == f"{path}:11" and rejected.reason == "damaged Parquet, the rest of this row group is lost"


def test_several_sources_in_one_word_are_told_apart(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_bytes(GOOD)
    with pytest.raises(DataError, match=f"separate several by spaces: {paths[0]} {paths[1]}"):
        iter_records(",".join(map(str, paths)))
    for missing in ("nowhere/", "a.jsonl,b.jsonl"):
        with pytest.raises(DataError, match="does not exist; check the path"):
            iter_records(missing)
