"""`--streaming`: places of records, the shares of ranks, what is told; without a run."""

import json
from functools import partial

import numpy
import pytest

from launch.assemble import check_streaming
from launch.common.errors import Reject, UserError
from launch.config.training_arguments import SftTrainingArguments
from launch.data.blank_rows import BLANK
from launch.data.encode import Encoder
from launch.data.encode_batch import BatchEncoder
from launch.data.read import sources_of
from launch.data.records import DataError
from launch.data.sources.files import source_fingerprint
from launch.data.sources.fingerprint import BLOCK
from launch.data.stream import Stream
from launch.data.stream_found import Found
from launch.data.streamed_rows import Share, StreamedRows, Streaming
from tests.support.tokenizers import byte_level

ROWS = 23
BROKEN, EMPTY, LONG = 3, 8, 14  # not JSON; refused before it is tokenised; too long, which only its tokens tell
USABLE = [number for number in range(ROWS) if number not in (BROKEN, EMPTY)]  # have places


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Two sources of 10 and 13 rows."""
    rows = [json.dumps({"prompt": f"{number} ", "completion": "yes"}) for number in range(ROWS)]
    rows[BROKEN], rows[EMPTY] = "{broken", json.dumps({"prompt": "8 ", "completion": ""})
    rows[LONG] = json.dumps({"prompt": "14 ", "completion": "no " * 100})
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, part in zip(paths, (rows[:10], rows[10:]), strict=True):
        path.write_text("\n".join(part) + "\n")
    return list(map(str, paths))


def encoder() -> BatchEncoder:
    tokenizer = byte_level("<|im_end|>", template=None)
    return BatchEncoder(tokenizer, Encoder(tokenizer, max_length=64))


def number_of(files: list[str], where: str) -> int:
    path, line = where.rsplit(":", 1)
    return 10 * files.index(path) + int(line) - 1


def numbers(files, stream: Stream, start: int, count: int, found: Found | None = None) -> list[int]:
    taken = []
    for place, record in stream.records(start, 0, found or Found()):
        assert place == start + len(taken)
        taken.append(number_of(files, record.where))
        if len(taken) == count:
            return taken
    raise AssertionError("a stream has no end")


def stream_of(files, buffer: int, left_out=frozenset()) -> Stream:
    return Stream(sources_of(files, streaming=True).train, encoder().example_of, buffer, left_out)


@pytest.mark.parametrize("buffer", [0, 1, 4, 7, 21, 100])
def test_each_epoch_has_every_record_once_and_a_start_anywhere_goes_on_alike(files, buffer):
    stream, epoch = stream_of(files, buffer), len(USABLE)
    taken = numbers(files, stream, 0, 4 * epoch)
    epochs = [taken[start : start + epoch] for start in range(0, len(taken), epoch)]
    for one in epochs:
        assert sorted(one) == USABLE
    orders = 4 if buffer > 1 else 1
    assert len(set(map(tuple, epochs))) == orders
    assert (epochs[0] == USABLE) == (orders == 1)
    for start in (1, 5, epoch - 1, epoch, epoch + 1, 2 * epoch, 3 * epoch - 1):
        assert numbers(files, stream, start, epoch) == taken[start : start + epoch], start


def test_a_buffer_is_emptied_before_it_is_filled_again(files):
    taken = numbers(files, stream_of(files, 7), 0, len(USABLE))
    for start in range(0, len(USABLE), 7):
        assert sorted(taken[start : start + 7]) == USABLE[start : start + 7]


def test_seeds_differ(files):
    stream = stream_of(files, 100)
    orders = {next(stream.records(0, seed, Found()))[1].where for seed in range(20)}
    assert len(orders) > 5


def test_held_out_records_have_no_place(files):
    left_out = frozenset({f"{files[0]}:1", f"{files[1]}:13"})
    taken = numbers(files, stream_of(files, 5, left_out), 0, len(USABLE) - 2)
    assert sorted(taken) == [number for number in USABLE if number not in (0, 22)]


def test_a_stream_of_nothing_is_refused(files):
    stream = stream_of(files, 5, frozenset(f"{file}:{line}" for file in files for line in range(1, 14)))
    with pytest.raises(DataError, match="no record to train on is left"):
        next(stream.records(0, 0, Found()))


def rows_of(files, rank: int, ranks: int, size: int, count: int, workers: int = 0, strict=False) -> StreamedRows:
    streaming = Streaming(stream_of(files, 6), encoder(), workers, strict, "")
    return StreamedRows(streaming, Share(rank, ranks, size), 0, count, token_id=7)


@pytest.mark.parametrize(("ranks", "size", "workers"), [(1, 4, 2), (2, 4, 0), (3, 2, 0), (4, 1, 2)])
def test_shares_make_up_the_rows_of_one_rank(files, ranks, size, workers):
    count = 60
    whole = rows_of(files, 0, 1, 4, count)
    alone = [whole[place] for place in range(count)]
    for rank in range(ranks):
        rows = rows_of(files, rank, ranks, size, count, workers)
        own = [place for place in range(count) if rows.share.has(place)]
        for place in own:
            row = rows[place]
            assert row["where"] == alone[place]["where"]
            for name in ("input_ids", "labels"):
                numpy.testing.assert_array_equal(row[name], alone[place][name])
        rows.close()
    blank = [place for place, row in enumerate(alone) if row["where"] == BLANK]
    assert len(blank) == 3  # the long row, in each of nearly three epochs of 21


def test_rows_before_the_first_that_is_asked_for_are_not_tokenised(files):
    rows = rows_of(files, 0, 1, 4, 60)
    encode, encoded = rows.streaming.encoder.encode, []
    begin = encode.begin
    encode.begin = lambda example: encoded.append(example.where) or begin(example)
    whole = [rows[place]["where"] for place in range(60)]
    encoded.clear()
    assert rows[50]["where"] == whole[50]
    assert len(encoded) == 10


def test_a_row_of_another_rank_is_an_error(files):
    rows = rows_of(files, 1, 2, 4, 60)
    with pytest.raises(RuntimeError, match="row 3 is not of the Share"):
        rows[3]


def test_what_is_told_comes_with_its_rows_and_from_one_rank(files):
    ranks = [rows_of(files, rank, 2, 3, 120) for rank in range(2)]
    told: list = [[], []]
    epochs: list = [[], []]
    rows = 0
    for place in range(69):  # the fourth epoch begins at 63, and rank 0 comes to it at 66
        rank = place // 3 % 2
        ranks[rank][place]
        if place % 3 == 2:
            taken = ranks[rank].found.take()
            told[rank] += [(place, rejected.reason) for rejected in taken.report.rejections]
            epochs[rank] += taken.epochs
            rows += taken.rows
    reasons = [reason for part in told for _, reason in part]
    assert [sum(word in reason for reason in reasons) for word in ("JSON", "empty", "longer")] == [4, 3, 3]
    assert told[0][0] == (2, "broken JSON")  # read with the first block
    assert not any("JSON" in reason or "empty" in reason for _, reason in told[1])
    for number, both in enumerate(zip(*epochs, strict=True), 1):
        assert [epoch.number for epoch in both] == [number] * 2
        assert sum(epoch.rows for epoch in both) == 20
        assert sum(epoch.dropped for epoch in both) == 3
    assert number == 3
    assert rows == 69 - 3


def test_a_resumed_rank_tells_nothing_again(files):
    rows = rows_of(files, 0, 1, 1, 60)
    for place in range(8, 21):
        rows[place]
    reasons = [rejected.reason for rejected in rows.found.take().report.rejections]
    assert not any("JSON" in reason for reason in reasons)  # line 4, in the first block of 6
    assert sum("longer" in reason for reason in reasons) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_strict_stops_at_the_first_bad_row_on_each_rank(files, rank):
    rows = rows_of(files, rank, 2, 1, 60, strict=True)
    with pytest.raises(DataError, match=r"broken JSON.*--strict"):
        rows[rank]


def test_checks_come_before_places(files):
    """A check that refuses other rows changes the places: it must be the same on all ranks."""

    def odd(record, files):
        if number_of(files, record.where) % 2:
            raise Reject("odd")

    stream = Stream(sources_of(files, streaming=True).train, partial(odd, files=files), 0)
    assert numbers(files, stream, 0, 12) == list(range(0, ROWS, 2))


def test_the_fingerprint_of_a_stream_sees_sizes_beginnings_and_ends(tmp_path):
    path = tmp_path / "a.jsonl"
    content = bytearray(b"x" * (3 * BLOCK))
    seen = set()
    for place, byte in [(0, "x"), (0, "y"), (3 * BLOCK - 1, "y")]:
        content[place] = ord(byte)
        path.write_bytes(content)
        seen.add(source_fingerprint(str(path), streamed=True))
    path.write_bytes(content + b"x")
    seen.add(source_fingerprint(str(path), streamed=True))
    assert len(seen) == 4
    content[BLOCK + 5] = ord("y")
    path.write_bytes(content)
    assert source_fingerprint(str(path), streamed=True) in seen  # what is not read
    assert source_fingerprint(str(path)) not in seen


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "--streaming needs --max_steps"),
        ({"max_steps": 5, "train_sampling_strategy": "group_by_length"}, "--shuffle_buffer 0"),
        ({"max_steps": 5, "dataloader_num_workers": 2}, "--data_workers"),
    ],
)
def test_what_cannot_go_with_streaming(values, words):
    with pytest.raises(UserError, match=words):
        check_streaming(SftTrainingArguments(output_dir="here", use_cpu=True, **values))


def test_reading_is_a_sign_of_life(files):
    beats = []
    records = stream_of(files, 7).records(2 * len(USABLE) + 8, 0, Found(), lambda: beats.append(1))
    next(records)
    # the first epoch's blocks and its empty last one, then those of the third up to the start
    assert len(beats) == 4 + 2
