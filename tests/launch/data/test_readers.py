"""Each kind of file gives the same records; formats are recognised."""

import csv
import errno
import gzip
import io
import json
import os
import random
import tracemalloc
import zlib

import datasets
import pandas
import pyarrow
import pyarrow.parquet
import pytest

from launch.common.errors import Reject
from launch.data.records import DataError, DropReport, Rejected
from launch.data.sources import json_text
from launch.data.sources.files import iter_records, source_fingerprint
from launch.data.sources.fingerprint import fingerprint_of_files
from tests.support.records import read_records

ROWS = [
    {"question": "two\nlines, and a comma", "answer": 'a "quote"'},
    {"question": "naïve 日本 😀", "answer": "  indented\n    more"},
    {"question": "", "answer": "\u2028 not a line end"},
]


def zstd(content: bytes) -> bytes:
    half = len(content) // 2  # two frames, as `cat a.zst b.zst` makes them
    return b"".join(pyarrow.Codec("zstd").compress(part, asbytes=True) for part in (content[:half], content[half:]))


def write(path, rows=ROWS):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    compress = {".gz": gzip.compress, ".zst": zstd}.get(path.suffix, bytes)
    kind = path.suffixes[0]
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if kind == ".jsonl":
        text = "\ufeff" + "\r\n".join(lines)
    elif path.name.startswith("lines"):
        text = "\n".join(lines)
    elif kind == ".json":
        text = json.dumps(rows, indent=1, ensure_ascii=False)
    else:
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        text = file.getvalue()
    path.write_bytes(compress(text.encode()))
    return path


TEXTS = ["a.jsonl", "a.json", "lines.json", "a.csv", "a.tsv"]
NAMES = [*TEXTS, "a.parquet", *(f"{name}{end}" for name in TEXTS for end in (".gz", ".zst"))]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_file_gives_the_same_records(tmp_path, name):
    path = write(tmp_path / name)
    report = DropReport()
    records = read_records(str(path), report, strict=True)
    assert [record.fields for record in records] == ROWS
    assert not len(report)
    assert records[0].where.startswith(f"{path}:")


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("end", [".gz", ".zst"])
def test_compression_is_known_by_content(tmp_path, name, end):
    path = write(tmp_path / f"{name}{end}").rename(tmp_path / name)
    assert [record.fields for record in read_records(str(path), DropReport(), strict=True)] == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.json.gz", "a.jsonl.zst", "a.tsv.zst"])
def test_a_file_is_not_held_in_memory(tmp_path, name):
    noise = random.Random(0)  # it must not vanish by compression
    rows = [{"question": str(number), "answer": noise.randbytes(600).hex()} for number in range(10_000)]
    path = write(tmp_path / name, rows)
    tracemalloc.start()
    arrow = pyarrow.total_allocated_bytes()
    try:
        for number, record in enumerate(iter_records(str(path))):
            assert int(record.fields["question"]) == number
            assert pyarrow.total_allocated_bytes() - arrow < 6e6
        assert number == 9_999 and tracemalloc.get_traced_memory()[1] < 8e6  # of 12 MB and more
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("chunk", [1, 2, 5, 64, 2**20])
def test_a_json_list_is_the_same_through_any_window(tmp_path, monkeypatch, chunk):
    items = [*ROWS, 12, 345, {}, {"a": [1, {"b": "]},{["}]}, *ROWS]
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps(items, indent=2, ensure_ascii=False).encode())
    lines = json.dumps(items, indent=2).splitlines()
    starts = [number for number, line in enumerate(lines, start=2) if line[:2] == "  " and line[2] not in " }"]
    monkeypatch.setattr(json_text, "CHUNK", chunk)
    rows = list(iter_records(str(path)))
    assert [row.where for row in rows] == [f"{path}:{line}" for line in starts]
    assert [row.detail if isinstance(row, Rejected) else row.fields for row in rows] == [
        "int" if isinstance(item, int) else item for item in items
    ]


@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_what_is_broken_in_a_json_list_is_at_its_column(tmp_path, monkeypatch, chunk):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"a": 2}, {"a": oh}, {"a": 3}]')
    monkeypatch.setattr(json_text, "CHUNK", chunk)
    *_, last = iter_records(str(path))
    assert last.detail == "broken JSON (Expecting value, column 28)"


def indented(*values) -> str:
    return "\n".join(json.dumps(value, indent=2) for value in values)


def line(value) -> str:
    return json.dumps(value)


A, B, C = ({"prompt": name, "completion": "x"} for name in "abc")
TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
SHAPES = {  # content; the rows with their lines; the lines that are rejected with their reasons
    "an indented object": (indented(A), [(1, A)], {}),
    "indented objects": ("\n" + indented(A, B) + "\n\n" + indented(C), [(2, A), (6, B), (11, C)], {}),
    "lines and an indented object": (f"{line(A)}\n{indented(TALK)}\n{line(C)}", [(1, A), (2, TALK), (14, C)], {}),
    "an indented conversation": (indented(TALK), [(1, TALK)], {}),
    "an object with empty lines": ('{\n\n"prompt":\n"a",\n"completion": "x"\n\n}\n' + line(B), [(1, A), (8, B)], {}),
    "a list over lines": (indented([A, B]), [(2, A), (6, B)], {}),
    "a list a line": (f"{line([A, B])}\n\n{line([C])}\n", [(1, A), (1, B), (3, C)], {}),
    "a list, then lines": (
        f"{indented([A])}\n{line(B)}\n[]\n{line(C)}",
        [(2, A), (7, B), (9, C)],
        {8: "not a JSON object"},
    ),
    "lists in a list": (f"[{line([A, B])},\n{line([C])}]", [(1, A), (1, B), (2, C)], {}),
    "a list of numbers": (f"{line(A)}\n[1, 2]\n{line(B)}", [(1, A), (3, B)], {2: "not a JSON object"}),
    "a list of rows and numbers": (f"{line(A)}\n{line([B, 2])}", [(1, A)], {2: "not a JSON object"}),
    "messages without a row": (
        f"{line(A)}\n{line(TALK['messages'])}",
        [(1, A)],
        {2: "a list of messages is not a row"},
    ),
    "a broken list a line": (f'[{{"prompt": oh}}]\n{line([A])}\n', [(2, A)], {1: "broken JSON"}),
    "an open list a line": (
        f"[{line(A)},\n{line([B])}\n{line([C])}",
        [(1, A)],
        {2: "broken JSON list, the rest of the file is lost"},
    ),
    "a line that lacks its end": (f'{{"prompt": "a",\n{line(B)}\n{line(C)}', [(2, B), (3, C)], {1: "broken JSON"}),
    "a value that is missing": (f'{{"prompt":\n{line(B)}\n{line(C)}', [(2, B), (3, C)], {1: "broken JSON"}),
    "a conversation that lacks its end": (f"{line(TALK)[:-3]},\n{line(B)}", [(2, B)], {1: "broken JSON"}),
    "a broken indented object": (
        f"{line(A)}\n{indented(B).replace(':', '', 1)}\n{indented(C)}",
        [(1, A), (6, C)],
        {2: "broken JSON"},
    ),
    "a broken indented conversation": (
        f"{indented(TALK).replace(':', '', 1)}\n{line(B)}",
        [(13, B)],
        {1: "broken JSON"},
    ),
    "an indented object that is no UTF-8": (
        f"{indented(A)}\n{indented({'prompt': '?', 'completion': 'b'})}\n{indented(B)}".replace("?", "\udcff"),
        [(1, A), (9, B)],
        {5: "not UTF-8"},
    ),
    "indented lines, one that lacks its end": (
        f'  {line(A)}\n  {{"prompt": \n  {line(B)}\n  {line(C)}',
        [(1, A), (3, B), (4, C)],
        {2: "broken JSON"},
    ),
    "a list in the first line that is broken": (
        f'{{"prompt": "a", "sources": [{{"x": 1}}, {{"y": oh}}]}}\n{line(B)}',
        [(2, B)],
        {1: "broken JSON"},
    ),
    "the last object lacks its end": (f"{line(A)}\n{indented(B)[:-2]}", [(1, A)], {2: "broken JSON"}),
    "something after an object": (f"{indented(A)} x\n{line(B)}", [(5, B)], {1: "broken JSON"}),
    "a key twice in an indented object": (
        '{\n"prompt": 1,\n"prompt": 2\n}\n' + line(B),
        [(5, B)],
        {1: "duplicate keys"},
    ),
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson.gz", "a.json.zst"])
@pytest.mark.parametrize(("content", "kept", "dropped"), SHAPES.values(), ids=SHAPES)
def test_json_of_any_shape(tmp_path, name, content, kept, dropped):
    path = tmp_path / name
    path.write_bytes(
        {".gz": gzip.compress, ".zst": zstd}.get(path.suffix, bytes)(content.encode(errors="surrogateescape"))
    )
    report = DropReport()
    records = read_records(str(path), report)
    assert [(record.where, record.fields) for record in records] == [(f"{path}:{line}", row) for line, row in kept]
    assert {r.where: r.reason for r in report.rejections} == {f"{path}:{line}": why for line, why in dropped.items()}
    assert len(report.rejections) == len(dropped) and not report.left_out


def test_an_indented_object_is_read_however_long_it_is(tmp_path):
    rows = [{"messages": [{"role": "user", "content": str(n)} for n in range(length)]} for length in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text(indented(*rows))
    assert [record.fields for record in read_records(str(path), DropReport(), strict=True)] == rows


def test_lines_lost_with_a_broken_object_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{json.dumps(A)}\n{{\n  "prompt": "a",\n\n  "completion": oh\n}}\n\n{json.dumps(B)}')
    report = DropReport()
    assert len(read_records(str(path), report)) == 2
    assert [str(r) for r in report.rejections] == [
        f"{path}:2: broken JSON (Expecting value, column 17 of line 5: 4 lines are lost with it)"
    ]


def test_lines_before_damage_are_read_though_they_were_looked_at_for_an_object(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    stream = zlib.compressobj(wbits=31)  # gzip
    path.write_bytes(stream.compress(f'{{"prompt":\n{line(A)}\n'.encode()) + stream.flush(zlib.Z_FULL_FLUSH))
    report = DropReport()
    assert [record.fields for record in read_records(str(path), report)] == [A]
    assert [(r.where.rsplit(":")[-1], r.reason[:12]) for r in report.rejections] == [
        ("1", "broken JSON"),
        ("3", "damaged gzip"),
    ]


WRAPPED = {  # content; the name of the list; its rows with their lines; what else the object holds
    "over lines": (indented({"data": [A, B]}), "data", [(3, A), (7, B)], ""),
    "on one line": (json.dumps({"rows": [A, B]}), "rows", [(1, A), (1, B)], ""),
    "after and before others": (
        indented({"version": "1", "counts": [1, [{}]], "none": None, "items": [A], "about": {"rows": [B]}}),
        "items",
        [(11, A)],
        "; not read: version, counts, none, about",
    ),
    "with an empty list beside it": (indented({"train": [A], "test": []}), "train", [(3, A)], "; not read: test"),
}


@pytest.mark.parametrize("chunk", [3, 2**20])
@pytest.mark.parametrize(("content", "name", "rows", "others"), WRAPPED.values(), ids=WRAPPED)
def test_the_rows_of_one_object(tmp_path, monkeypatch, content, name, rows, others, chunk):
    monkeypatch.setattr(json_text, "CHUNK", chunk)
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(content.encode()))
    report = DropReport()
    records = read_records(str(path), report, strict=True)
    assert [(record.where, record.fields) for record in records] == [(f"{path}:{line}", row) for line, row in rows]
    assert report.left_out == [f"{path} holds one JSON object: its list {name!r} is read as rows{others}"]


NOT_WRAPPED = {
    "a conversation": TALK,
    "a conversation under another name": {"dialogue": TALK["messages"]},
    "ShareGPT": {"id": 1, "conversations": [{"from": "human", "value": "a"}]},
    "a row with sources": A | {"sources": [{"title": "b"}]},
    "no objects": {"names": ["a", "b"], "data": [[A]]},
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("row", NOT_WRAPPED.values(), ids=NOT_WRAPPED)
def test_one_object_that_is_a_row(tmp_path, row, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(row, indent=indent))
    assert [record.fields for record in read_records(str(path), DropReport(), strict=True)] == [row]


def test_lines_that_each_hold_a_list_are_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"data": [A]}, {"data": [B, C]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [record.fields for record in read_records(str(path), DropReport(), strict=True)] == rows


def test_one_object_with_two_lists_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(indented({"train": [A], "test": [B]}))
    with pytest.raises(DataError, match=r"several lists of objects \(train, test\), but one"):
        read_records(str(path), DropReport())


def test_one_object_that_lacks_its_end(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(indented({"version": 1, "data": [A, B, C]})[:-40])
    report = DropReport()
    assert [record.fields for record in read_records(str(path), report)] == [A, B]
    assert [(r.where, r.reason) for r in report.rejections] == [
        (f"{path}:12", "broken JSON list, the rest of the file is lost")
    ]


def test_keys_that_arrow_filled_with_null_are_absent_at_every_depth(tmp_path):
    call = {"name": "f", "arguments": {"x": 1}}
    rows = [
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "calls": [call, {"name": "g"}]}],
            "n": None,
        },
        {"messages": [{"role": "tool", "content": "b"}], "n": {"deep": [{"a": 1}, {"b": None}, None]}},
        {"messages": None, "n": None},
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    rows[1]["n"]["deep"][1] = {}
    assert [dict(record.fields) for record in read_records(str(path), DropReport())] == rows


def test_a_fingerprint_tells_files_apart_whatever_they_hold(tmp_path):
    for name, content in {"x": b"x", "empty": b"", "like both": b"x\0a\0"}.items():
        (tmp_path / name).write_bytes(content)
    two = fingerprint_of_files([("a", tmp_path / "x"), ("b", tmp_path / "empty")])
    assert two != fingerprint_of_files([("b", tmp_path / "like both")])


def test_maps_and_json_columns_are_what_was_written(tmp_path):
    path = tmp_path / "a.parquet"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"x": None}, 1.5]}]
    features = datasets.Features({"messages": datasets.List(datasets.Json()), "any": datasets.Json()})
    rows = {"messages": [talk, None], "any": [{"deep": [1, {"b": None}]}, None]}
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved.to_parquet(path)
    saved.save_to_disk(tmp_path / "saved")
    expected = [{"messages": talk, "any": rows["any"][0]}, {"messages": None, "any": None}]
    for source in (path, tmp_path / "saved"):
        assert [dict(record.fields) for record in read_records(str(source), DropReport(), strict=True)] == expected
    text, number = pyarrow.string(), pyarrow.struct([("n", pyarrow.int64()), ("m", pyarrow.int64())])
    maps = pyarrow.array([[("k", {"n": 1})], None, [("k", None), ("k", None)]], pyarrow.map_(text, number))
    pyarrow.parquet.write_table(pyarrow.table({"map": maps}), path)
    first, second, third = read_records(str(path), DropReport(), strict=True)
    assert first.fields["map"] == {"k": {"n": 1}} and second.fields["map"] is None
    with pytest.raises(Reject, match="map cannot be read"):  # one name twice
        third.fields["map"]


INDEXED = {
    "a.csv": (",prompt,completion\n0,a,x\n1,b,x\n", "a column without a name"),
    "a.tsv": ("Unnamed: 0\tprompt\tcompletion\n0\ta\tx\n1\tb\tx\n", "Unnamed: 0"),
    "twice.csv": (",Unnamed: 0,prompt,completion\n0,0,a,x\n1,1,b,x\n", "a column without a name, Unnamed: 0"),
    "a.parquet": (None, "__index_level_0__"),
    "saved": (None, "__index_level_0__"),
}


@pytest.mark.parametrize(("name", "content", "said"), [(name, *rest) for name, rest in INDEXED.items()], ids=INDEXED)
def test_an_index_of_pandas_is_not_read(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    else:
        frame = pandas.DataFrame([A, B, C])[lambda frame: frame.prompt != "c"]
        table = pyarrow.Table.from_pandas(frame, preserve_index=True)
        pyarrow.parquet.write_table(table, path) if path.suffix else datasets.Dataset(table).save_to_disk(path)
    report = DropReport()
    assert [dict(record.fields) for record in read_records(str(path), report, strict=True)] == [A, B]
    assert report.left_out == [f"not read: {said}, the index that pandas wrote beside the data"]


def test_a_note_is_made_once_for_all_files_of_a_directory(tmp_path):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text(INDEXED["a.csv"][0])
    report = DropReport()
    assert len(read_records(str(tmp_path), report)) == 4 and len(report.left_out) == 1


def test_a_saved_data_set(tmp_path):
    dataset = datasets.Dataset.from_list([A, B, C])
    dataset.select([2, 0]).save_to_disk(tmp_path / "one", num_shards=2)
    records = read_records(str(tmp_path / "one"), DropReport(), strict=True)
    assert [(r.where, dict(r.fields)) for r in records] == [(f"{tmp_path}/one:1", C), (f"{tmp_path}/one:2", A)]
    before = source_fingerprint(str(tmp_path / "one"))
    (tmp_path / "one" / "cache-123.arrow").write_bytes(b"left by map")
    assert source_fingerprint(str(tmp_path / "one")) == before
    datasets.Dataset.from_list([C, B]).save_to_disk(tmp_path / "other", num_shards=2)
    assert source_fingerprint(str(tmp_path / "other")) != before


def test_splits_of_a_saved_data_set(tmp_path):
    splits = {"train": [A, B], "test": [C]}
    saved = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "all")
    for held_out, name in ((False, "train"), (True, "test")):
        report = DropReport()
        records = read_records(str(tmp_path / "all"), report, True, held_out)
        assert [dict(record.fields) for record in records] == splits[name]
        assert records[0].where == f"{tmp_path}/all/{name}:1" and len(report.left_out) == 1
    folds = datasets.DatasetDict(first=saved["train"], second=saved["test"])
    folds.save_to_disk(tmp_path / "folds")
    write(tmp_path / "folds" / "more.jsonl")
    assert len(read_records(str(tmp_path / "folds"), DropReport(), strict=True)) == 3 + len(ROWS)


def test_a_fingerprint_tells_what_would_be_read(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", ROWS[:1])
    (tmp_path / "notes.txt").write_text("a")
    source = str(tmp_path)
    first, held_out = source_fingerprint(source), source_fingerprint(source, held_out=True)
    assert first != held_out
    (tmp_path / "notes.txt").write_text("b")
    write(tmp_path / "test.jsonl", ROWS[:2])
    assert source_fingerprint(source) == first and source_fingerprint(source, held_out=True) != held_out
    (tmp_path / "sub").mkdir()
    (tmp_path / "train.jsonl").rename(tmp_path / "sub" / "train.jsonl")
    assert source_fingerprint(source) != first
    (tmp_path / "sub" / "train.jsonl").rename(tmp_path / "train.jsonl")
    assert source_fingerprint(source) == first
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
    moved = []
    for cut in (1, 2):  # the same bytes in the same files, but not divided alike
        content = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
        (tmp_path / "a" / "train.jsonl").write_bytes(content[:cut])
        (tmp_path / "b" / "train.jsonl").write_bytes(content[cut:])
        moved.append(source_fingerprint(source))
    assert moved[0] != moved[1]
    with pytest.raises(DataError, match="does not exist"):
        source_fingerprint(str(tmp_path / "missing.jsonl"))


def test_gzip_is_known_by_its_content(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(json.dumps(ROWS[0]).encode()))
    assert [record.fields for record in read_records(str(path), DropReport())] == ROWS[:1]


def test_directory_is_read_in_sorted_order_without_hidden_and_other_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".cache").mkdir()
    for name in ("b.jsonl", "a.parquet", "sub/c.csv", ".cache/d.jsonl"):
        write(tmp_path / name)
    (tmp_path / "README.md").write_text("no data")
    records = read_records(str(tmp_path), DropReport(), strict=True)
    assert [record.fields for record in records] == ROWS * 3
    files = list(dict.fromkeys(record.where.rsplit(":", 1)[0] for record in records))
    assert files == [f"{tmp_path}/{name}" for name in ("a.parquet", "b.jsonl", "sub/c.csv")]


def names(records) -> list[str]:
    return list(dict.fromkeys(record.where.rsplit(":", 1)[0].rsplit("/", 1)[1] for record in records))


def test_what_a_directory_holds_beside_data_is_counted(tmp_path):
    write(tmp_path / "a.jsonl")
    write(tmp_path / "readme.jsonl")
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    unread = {
        "a.parquet.gz": "not a supported file type",
        "b.txt": "not a supported file type",
        "elsewhere": "a symlink to a directory",
        "gone.jsonl": "not a regular file",
        "pipe.jsonl": "not a regular file",
        "sub/c.jsonl.xz": "not a supported file type",
        "sub/d.jsonl.bz2": "not a supported file type",
    }
    for name in ("a.parquet.gz", "b.txt", "sub/c.jsonl.xz", "sub/d.jsonl.bz2", ".e.txt", ".hidden/f.txt"):
        (tmp_path / name).write_text("x")
    for name in ("README", "readme.txt", "LICENSE.txt", "notes.MD", "dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "elsewhere").symlink_to(tmp_path / ".hidden")
    report = DropReport()
    assert names(read_records(str(tmp_path), report)) == ["a.jsonl", "readme.jsonl"]
    assert report.counts() == {"unread file": len(unread)}
    assert {r.where: r.detail for r in report.rejections} == {
        f"{tmp_path}/{name}:1": why for name, why in unread.items()
    }
    with pytest.raises(DataError, match=r"/a\.parquet\.gz:1: unread file \(not a supported file type\)\. Fix"):
        read_records(str(tmp_path), DropReport(), strict=True)


def test_a_directory_that_cannot_be_listed_is_counted(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl")
    (tmp_path / "b").mkdir()
    scandir = os.scandir

    def refused(path):
        if os.path.basename(path) == "b":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)  # root may list everything
    report = DropReport()
    read_records(str(tmp_path), report)
    assert [str(r) for r in report.rejections] == [
        f"{tmp_path}/b:1: unread file (cannot be listed: Permission denied)"
    ]


SPLITS = {
    "test": (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
    "parts": (
        ["Train-0-of-2.parquet", "train-1-of-2.parquet", "validation-0-of-1.parquet", "dev.csv", "evaluation.json"],
        ["Train-0-of-2.parquet", "train-1-of-2.parquet"],
        ["dev.csv", "evaluation.json", "validation-0-of-1.parquet"],
    ),
    "words in names": (
        ["gsm8k_train.jsonl", "gsm8k_test.jsonl", "latest.csv"],
        ["gsm8k_train.jsonl"],
        ["gsm8k_test.jsonl"],
    ),
    "sets": (
        ["TrainData.csv", "testset.csv", "train-core.csv"],
        ["TrainData.csv", "train-core.csv"],
        ["testset.csv"],
    ),
    "held_out": (["training.csv", "held_out.csv"], ["training.csv"], ["held_out.csv"]),
    "one made of the other": (["train.csv", "test_from_train.csv"], ["train.csv"], ["test_from_train.csv"]),
    "a directory of tests": (["train/a.csv", "tests/b.csv"], ["a.csv"], ["b.csv"]),
    "directories": (["test/0.jsonl", "train/1.jsonl"], ["1.jsonl"], ["0.jsonl"]),
    "a directory named otherwise": (["test/train.jsonl", "train/test.csv"], ["train.jsonl"], ["test.csv"]),
    "a third name": (["more.csv", "train.jsonl", "valid.jsonl"], ["train.jsonl"], ["valid.jsonl"]),
    "train alone": (["more.csv", "train.jsonl"], ["more.csv", "train.jsonl"], ["more.csv", "train.jsonl"]),
    "test alone": (["more.csv", "test.jsonl"], ["more.csv", "test.jsonl"], ["more.csv", "test.jsonl"]),
}


@pytest.mark.parametrize(("files", "trained", "evaluated"), SPLITS.values(), ids=SPLITS)
def test_a_directory_of_splits(tmp_path, files, trained, evaluated):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name)
    for held_out, wanted in ((False, trained), (True, evaluated)):
        report = DropReport()
        assert names(read_records(str(tmp_path), report, True, held_out)) == wanted
        left_out = sorted({name.rsplit("/", 1)[-1] for name in files} - set(wanted))
        assert len(report.left_out) == bool(left_out)
        assert all(name in report.left_out[0] for name in left_out)
        assert all(("--eval_data" in note) != held_out for note in report.left_out)


def test_both_splits_of_one_directory_are_noted(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl")
    report = DropReport()
    assert names(read_records(str(tmp_path), report)) == ["train.jsonl"]
    (sentence,) = report.summary().splitlines()[1:]
    assert sentence.startswith(f"{tmp_path} has files named train, so others are left out: test.jsonl; to evaluate")
    assert names(read_records(str(tmp_path), report, held_out=True)) == ["test.jsonl"]
    assert len(report.left_out) == 2


def test_a_train_file_that_is_not_read_does_not_make_a_test_file_one_to_train_on(tmp_path):
    (tmp_path / "train.jsonl.xz").write_text("x")
    write(tmp_path / "test.jsonl")
    with pytest.raises(DataError, match=r"none \(not read: train\.jsonl\.xz; left out: test\.jsonl\)"):
        read_records(str(tmp_path), DropReport())


def test_notes_about_testing_are_no_split(tmp_path):
    for name in ("train.jsonl", "more.jsonl"):
        write(tmp_path / name)
    (tmp_path / "testing.txt").write_text("x")
    assert names(read_records(str(tmp_path), DropReport())) == ["more.jsonl", "train.jsonl"]


def test_a_csv_field_may_be_long_and_the_limit_is_left_as_it_was(tmp_path):
    before = csv.field_size_limit(1000)
    try:
        path = write(tmp_path / "a.csv", [{"question": "q" * 200_000, "answer": "a"}])
        assert len(read_records(str(path), DropReport(), strict=True)[0].fields["question"]) == 200_000
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)
