"""Each kind of file gives the same records; formats are recognised."""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from launch.data.formats import ChatExample, TextExample, TokenExample, detect_format, to_example
from launch.data.readers import read_records
from launch.data.records import DropReport, Record, Reject

ROWS = [
    {"question": "two\nlines, and a comma", "answer": 'a "quote"'},
    {"question": "naïve 日本 😀", "answer": "  indented\n    more"},
    {"question": "", "answer": "\u2028 not a line end"},
]


def write(path, rows=ROWS):
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if path.name.endswith(".jsonl"):
        path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    elif path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    elif path.name == "lines.json":
        path.write_text("\n".join(lines))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


NAMES = ["a.jsonl", "a.jsonl.gz", "a.json", "lines.json", "a.parquet", "a.csv", "a.tsv"]


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_file_gives_the_same_records(tmp_path, name):
    path = write(tmp_path / name)
    report = DropReport()
    records = read_records(str(path), report, strict=True)
    assert [record.fields for record in records] == ROWS
    assert not len(report)
    assert records[0].where.startswith(f"{path}:")


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


def test_a_csv_field_may_be_long_and_the_limit_is_left_as_it_was(tmp_path):
    before = csv.field_size_limit()
    path = write(tmp_path / "a.csv", [{"question": "q" * 200_000, "answer": "a"}])
    assert len(read_records(str(path), DropReport(), strict=True)[0].fields["question"]) == 200_000
    assert csv.field_size_limit() == before


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
RECOGNISED = {
    "prompt/completion": ({"prompt": "p", "completion": "c"}, TextExample("p", "c", "f:1")),
    "question/answer": (
        {"question": "q?", "answer": "a"},
        TextExample("Question: q?\nAnswer:", " a", "f:1"),
    ),
    "instruction/input/output": (
        {"instruction": "do", "input": "this", "output": "done"},
        TextExample("Instruction: do\nInput: this\nResponse:", " done", "f:1"),
    ),
    "messages": ({"messages": CHAT}, ChatExample(CHAT, "f:1")),
    "already tokenised": (
        {"input_ids": [1, 2], "labels": [-100, 2]},
        TokenExample([1, 2], [-100, 2], "f:1"),
    ),
}


@pytest.mark.parametrize("format", RECOGNISED)
def test_format_is_recognised_beside_other_fields(format):
    fields, example = RECOGNISED[format]
    fields = fields | {"id": 7, "source": "x"}
    assert detect_format(fields) == format
    assert to_example(Record(fields, "f:1"), format) == example


@pytest.mark.parametrize("given", [{}, {"input": ""}, {"input": None}])
def test_instruction_without_input(given):
    fields = {"instruction": "do {input}", "output": "done"} | given
    example = to_example(Record(fields, "f:1"), "instruction/input/output")
    assert example.prompt == "Instruction: do {input}\nResponse:"


def test_null_columns_do_not_decide_the_format():
    fields = {"messages": None, "prompt": "p", "completion": "c", "input_ids": None, "labels": None}
    assert detect_format(fields) == "prompt/completion"


def test_a_missing_field_is_named():
    with pytest.raises(Reject, match="no field 'completion'"):
        to_example(Record({"prompt": "p"}, "f:1"), "prompt/completion")


def test_keys_that_parquet_filled_with_null_leave_the_messages():
    messages = [message | {"tool_calls": None} for message in CHAT]
    assert to_example(Record({"messages": messages}, "f:1"), "messages").messages == CHAT
