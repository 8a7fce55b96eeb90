"""Data sets and models of a hub, read over HTTP from one on this machine."""

import io
import json
import time
from itertools import islice

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launch.config.options import SftOptions
from launch.data.load import load_data
from launch.data.prepared import EncodedData
from launch.data.read import sources_of
from launch.data.records import DataError, Record
from launch.data.sources.files import iter_records, source_fingerprint
from launch.data.sources.hub import builder_of
from launch.data.stream import Stream
from launch.data.stream_found import Found
from launch.model.load import load_model
from tests.support.hub import Hub
from tests.support.tokenizers import byte_level

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
OTHER_CALL = {"type": "function", "function": {"name": "find", "arguments": {"text": "yes"}}}
ROWS = [
    {"messages": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": str(n + 1)}], "id": n}
    for n in range(300)
]
for number, call in ((7, CALL), (8, OTHER_CALL)):
    ROWS[number]["messages"][1] = {"role": "assistant", "content": None, "tool_calls": [call]}
CONFIGURATIONS = b"""---
configs:
- config_name: sums
  data_files:
  - {split: train, path: sums/*.jsonl}
  - {split: test, path: more/*.jsonl}
- config_name: others
  data_files: more/*.jsonl
---
"""


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with Hub(folder) as hub:
        hub.add("owner/lines", {"train.jsonl": jsonl(ROWS), "README.md": b"# Sums\n"})
        hub.add(
            "owner/parts", {"data/train-0.parquet": parquet(ROWS[:100]), "data/train-1.parquet": parquet(ROWS[100:])}
        )
        hub.add("owner/changing", {"train.jsonl": jsonl(ROWS)})
        files = {"README.md": CONFIGURATIONS, "sums/a.jsonl": jsonl(ROWS[:9]), "more/a.jsonl": jsonl(ROWS[9:12])}
        hub.add("owner/several", files)
        hub.add("owner/private", {"train.jsonl": jsonl(ROWS)}, refusal=(401, "RepoNotFound"))
        hub.add("owner/secret", {"train.jsonl": jsonl(ROWS)}, refusal=(401, "RepoNotFound"), token="sesame")
        hub.add("owner/gated", {"train.jsonl": jsonl(ROWS)}, refusal=(403, "GatedRepo"))
        hub.add("owner/script", {"script.py": b"raise SystemExit\n"})
        hub.add("owner/copied", {"copied.py": b"raise SystemExit\n"})
        hub.repositories["owner/copied"].branches["refs/convert/parquet"] = {"all/train/0.parquet": parquet(ROWS[:9])}
        hub.add("owner/words", {"README.md": b"# Words\n"})
        hub.add("owner/broken", {"a.jsonl": jsonl(ROWS), "b.jsonl": b"{broken\n"})
        model = hub.add("owner/model")
        tokenizer = byte_level("<|im_end|>")
        tokenizer.save_pretrained(model)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(model)
        (folder / "rows.jsonl").write_bytes(jsonl(ROWS))
        yield hub


@pytest.fixture(autouse=True)
def another_run():
    """Each test is a run of its own, which keeps the commits that it has found."""
    builder_of.cache_clear()


def rows_of(source: str, streamed: bool = False) -> list[dict]:
    records = [record for record in iter_records(source, streamed=streamed) if isinstance(record, Record)]
    assert [record.where for record in records] == [f"{source}:{n}" for n in range(1, len(records) + 1)]
    return [dict(record.fields) for record in records]


def without_nulls(value):
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("streamed", [False, True], ids=["mapped", "streamed"])
@pytest.mark.parametrize("name", ["owner/lines", "owner/parts"])
def test_rows_are_those_of_the_files(hub, name, streamed):
    assert without_nulls(rows_of(name, streamed)) == without_nulls(ROWS)


@pytest.mark.parametrize("streamed", [False, True], ids=["mapped", "streamed"])
def test_a_configuration_and_a_split_can_be_named(hub, streamed):
    assert len(rows_of("owner/several:sums:train", streamed)) == 9
    assert len(rows_of("owner/several:sums:test", streamed)) == 3
    assert len(rows_of("owner/several:others:train", streamed)) == 3
    assert len(rows_of("owner/lines:train", streamed)) == 300


def test_a_branch_can_be_named(hub):
    """As that of the Parquet files that the hub makes of data sets with a loading script."""
    for streamed in (False, True):
        records = iter_records("owner/copied@refs/convert/parquet:train", streamed=streamed)
        places = [record.where for record in records if isinstance(record, Record)]
        assert places == [f"owner/copied:train:{n}" for n in range(1, 10)]


def places(source: str, start: int, count: int) -> list[list]:
    stream = Stream(sources_of([source], streaming=True).train, lambda record: None, buffer=32)
    return [[place, record.fields["messages"]] for place, record in islice(stream.records(start, 3, Found()), count)]


@pytest.mark.parametrize("start", [0, 250, 1000])
def test_a_stream_is_that_of_the_file_from_any_place_on(hub, start):
    expected = without_nulls(places(str(hub.folder / "rows.jsonl"), start, 200))
    assert without_nulls(places("owner/lines", start, 200)) == expected


def loaded(hub: Hub, source: str, streaming: bool = False) -> EncodedData:
    options = SftOptions(data=[source], model=str(hub.folder / "owner/model"), data_workers=0, streaming=streaming)
    return load_data(options)[1]


def digest_of(*of) -> str:
    return loaded(*of).digest


def test_a_changed_data_set_is_noticed_and_its_old_commit_can_be_named(hub, capsys):
    path = hub.folder / "owner/changing/train.jsonl"
    before = source_fingerprint("owner/changing")
    prepared, streaming = digest_of(hub, "owner/changing"), loaded(hub, "owner/changing", True)
    streamed = streaming.digest
    commit = before.split()[0]
    assert f"owner/changing has commit {commit}; --data owner/changing@{commit} reads" in capsys.readouterr().out
    path.write_bytes(jsonl(ROWS[:200]))
    assert source_fingerprint("owner/changing") == before and len(rows_of("owner/changing", True)) == 300
    builder_of.cache_clear()
    (source,) = streaming.streaming.stream.sources  # of another rank, which asks the hub later
    assert sum(isinstance(record, Record) for record in source.records()) == 300
    assert source_fingerprint("owner/changing") != before
    assert len(rows_of("owner/changing")) == len(rows_of("owner/changing", True)) == 200
    assert digest_of(hub, "owner/changing") != prepared and digest_of(hub, "owner/changing", True) != streamed
    old = f"owner/changing@{commit}"
    capsys.readouterr()
    assert digest_of(hub, old) == prepared and "from the cache" in capsys.readouterr().out
    assert digest_of(hub, old, True) == streamed
    path.write_bytes(jsonl(ROWS))
    (hub.folder / "owner/changing/README.md").write_bytes(b"# Other words\n")
    builder_of.cache_clear()
    assert digest_of(hub, "owner/changing") == prepared  # the rows are the same


def test_a_token_opens_a_private_data_set(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "sesame")
    assert len(rows_of("owner/secret")) == 300


@pytest.mark.parametrize("streamed", [False, True], ids=["mapped", "streamed"])
@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("owner/nothing", r"doesn't exist.*; check the name; for a private one log in \(hf auth login, or HF_TOKEN"),
        ("owner/private", r"cannot be accessed.*; check the name; for a private one log in \(hf auth login"),
        ("what ever", "'what ever'.*; check the path, or the name"),
        ("owner/gated", r"is a gated dataset.*; log in as one who has access \(hf auth login, or HF_TOKEN"),
        ("owner/lines@nowhere", "Revision 'nowhere' doesn't exist.*; check the name and the revision"),
        ("owner/script", r"found script\.py\); no code .* owner/script@refs/convert/parquet, or convert it"),
        ("owner/words", "any data files.*; give the name of a data set of JSONL"),
        ("owner/several", r"\['sums', 'others'\]\); name a configuration or a split .*owner/several:config:split"),
        ("owner/several:mine:train", "'mine' not found.*'sums', 'others'.*; name a configuration or a split"),
        ("owner/lines:test", r"test.*\['train'\].*; name a configuration or a split"),
        ("owner/broken", r"Expected object.*; to drop the rows .*: hf download .* owner/broken\."),
    ],
)
def test_what_cannot_be_loaded_is_a_sentence_that_says_what_to_do(hub, source, words, streamed):
    with pytest.raises(DataError, match=words) as raised:
        rows_of(source, streamed)
    assert str(raised.value).startswith(f"'{source}' ") and str(raised.value).endswith(".")
    assert "\n" not in str(raised.value)


def test_without_a_network(hub, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client tries again after a while
    assert len(rows_of("owner/lines")) == 300
    builder_of.cache_clear()
    with hub.down():
        for streamed in (False, True):
            with pytest.raises(DataError, match=r"^'owner/other' .*; check the network and start the same command"):
                rows_of("owner/other", streamed)
        assert len(rows_of("owner/lines")) == 300  # it was downloaded before
        with pytest.raises(DataError, match=f"revision {'0' * 40} is not the one that was downloaded"):
            rows_of(f"owner/lines@{'0' * 40}")


def test_a_stream_that_breaks_off_is_no_short_epoch(hub):
    records = iter_records("owner/broken", streamed=True)
    with pytest.raises(DataError, match="'owner/broken' could not be read past row 256 from the hub"):
        list(records)


def test_a_tokenizer_and_a_model_of_the_hub(hub):
    local, named = (
        SftOptions(model=name, max_length=64) for name in (str(hub.folder / "owner/model"), "owner/model")
    )
    tokenizer, _ = load_data(SftOptions(model="owner/model", data=[str(hub.folder / "rows.jsonl")], data_workers=0))
    one, other = (load_model(options, tokenizer, torch.float32, 0).state_dict() for options in (local, named))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
