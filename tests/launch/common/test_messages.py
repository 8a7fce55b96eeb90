"""What data and file names hold reaches a terminal as text, in its line, and not at length."""

import json

import pytest

from launch.common.errors import Reject
from launch.common.messages import (
    counted,
    did_you_mean,
    error_line,
    listed,
    one_line,
    printable,
    shortened,
    typed_error_line,
)
from launch.data.records import DataError, DropReport
from launch.data.train_tokenizer import train_tokenizer
from tests.support.data import prepared

ESCAPE = "\x1b[2J"
CONTROLS = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]


def test_controls_are_escaped_and_other_text_is_left():
    kept = [code for code in CONTROLS if printable(chr(code)) == chr(code)]
    assert kept == [ord("\t"), ord("\n")]
    assert printable(ESCAPE + "\x07\r\x9b\x7f\u202e\u2066") == r"\x1b[2J\x07\r\x9b\x7f\u202e\u2066"
    assert printable("naïve 日本 😀\n\tטקסט \\ \ud800") == "naïve 日本 😀\n\tטקסט \\ \\ud800"


def test_one_line_has_no_line_break():
    assert one_line("a\nb\tc\r\n\u2028\u2029\x85d") == r"a\nb\tc\r\n\u2028\u2029\x85d"
    assert len(one_line("".join(map(chr, range(0x2100)))).splitlines()) == 1


def test_what_is_long_is_cut():
    assert shortened("a" * 80) == "a" * 80
    assert shortened("a" * 81) == "a" * 77 + "..."
    assert shortened("\n" * 10**6, 10) == r"\n\n\n\..."


def test_an_error_is_one_line():
    assert error_line(ValueError("expected\n  a,\tgot b\n")) == "expected a, got b"
    assert error_line(ValueError(ESCAPE + "x" * 400), 20) == r"\x1b[2J" + "x" * 10 + "..."
    assert error_line(ValueError(" \n")) == "ValueError"
    assert typed_error_line(OSError("no")) == "OSError: no"


@pytest.mark.parametrize(
    "stack", ["\nframe #0: c10::Error", "\nException raised from alloc at a.cpp:1 (frame #0: f)"]
)
def test_a_stack_of_cpp_is_left_out(stack):
    assert error_line(RuntimeError("not enough memory" + stack)) == "not enough memory"


def test_the_nearest_name():
    assert did_you_mean("smothing", ["smoothing", "seed"]) == "; did you mean 'smoothing'?"
    assert did_you_mean("zzz", ["smoothing"]) == did_you_mean(3, ["smoothing"]) == ""


def test_a_row_of_the_report_is_one_line():
    report = DropReport()
    report.add(f"a\nb{ESCAPE}.jsonl:1", Reject("broken", f"field\n{ESCAPE}"))
    report.truncated.append("c\nd.jsonl:1")
    assert str(report.rejections[0]) == r"a\nb\x1b[2J.jsonl:1: broken (field\n\x1b[2J)"
    assert report.summary().splitlines() == [
        "1 row dropped",
        r"  1 x broken: a\nb\x1b[2J.jsonl:1 (field\n\x1b[2J)",
        r"1 prompt shortened from the left (rows kept): c\nd.jsonl:1",
    ]
    with pytest.raises(DataError) as caught:
        report.add("a\nb:1", Reject("broken"), strict=True)
    assert str(caught.value).startswith(r"a\nb:1: broken. ")


def test_a_file_name_of_two_lines(tmp_path):
    path = tmp_path / "a\nb.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    data = prepared(str(path), train_tokenizer(["a b"], 300), 64)
    assert data.train["where"][:] == [f"{tmp_path}/a\\nb.jsonl:1"]


MANY = [f"column{number}" for number in range(20_000)]
LONG = {
    "names of fields": json.dumps(dict.fromkeys(MANY, 1)),
    "a name of a field": json.dumps({"f" * 10**6: 1}),
    "a key twice": '{"%s": 1, "%s": 2}' % (("k" * 10**6,) * 2),
    "a role": json.dumps({"messages": [{"role": "r" * 10**6, "content": "a"}]}),
    "a token": json.dumps({"input_ids": [5, 10**4000], "labels": [-100, 5]}),
}


@pytest.mark.parametrize("line", LONG.values(), ids=LONG)
def test_what_a_row_holds_is_cut_in_the_report(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line)
    report = prepared(str(path), train_tokenizer(["some words"], 300)).report
    (rejected,) = report.rejections
    assert 0 < len(rejected.detail) <= 80 and rejected.detail.endswith("...")


def test_what_a_file_holds_is_cut_in_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text(LONG["names of fields"])
    (tmp_path / "a.csv").write_text(",".join([*MANY, "column7" + "7" * 10**6, "column7" + "7" * 10**6]) + "\n")
    tokenizer = train_tokenizer(["some words"], 300)
    for name in ("a.jsonl", "a.csv"):
        with pytest.raises(DataError) as caught:
            prepared(str(tmp_path / name), tokenizer)
        length = len(str(caught.value))
        assert length < 1000 + len(str(tmp_path)) and "column7" in str(caught.value)


def test_one_and_many():
    assert [counted(n, "row") for n in (0, 1, 2, 1000)] == ["0 rows", "1 row", "2 rows", "1,000 rows"]
    assert counted(1, "process", "processes") == "1 process" and counted(2, "process", "processes") == "2 processes"
    assert listed("rank", {1}) == "rank 1" and listed("rank", {3, 1}) == "ranks 1, 3"
