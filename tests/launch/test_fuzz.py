"""Whatever comes in, a sentence comes out: data files, recipes, DeepSpeed files and arguments of the loss, at random.

`pytest tests/launch/test_fuzz.py -s` shows how many examples ran; `FUZZ=100` makes them a hundred times as many.
"""

import gzip
import io
import json
import os
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.common.errors import UserError
from launch.config.command_line import parse_options
from launch.config.deepspeed import deepspeed_config
from launch.config.options import SftOptions
from launch.config.training_arguments import SftTrainingArguments
from launch.data.records import DataError, Note, Record
from launch.data.sources import json_text
from launch.data.sources.files import iter_records
from launch.data.train_tokenizer import train_tokenizer
from smoothing import VocabShard, vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from tests.support.data import prepared

EXAMPLES = 150 * int(os.environ.get("FUZZ", "1"))
FUZZED = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
COUNTS: dict[str, int] = {}

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FIELDS = [
    "prompt",
    "completion",
    "question",
    "answer",
    "instruction",
    "input",
    "output",
    "messages",
    "input_ids",
    "labels",
]
messages = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "name"]), st.sampled_from(["user", "assistant", ""]) | values)
)
rows = st.dictionaries(
    st.sampled_from(FIELDS), values | messages | st.lists(st.integers(-101, 400), max_size=20), max_size=4
)


@pytest.fixture(scope="module", autouse=True)
def report():
    yield
    print("".join(f"\n{name}: {count} examples" for name, count in COUNTS.items()))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words to learn from, in a sentence\n"] * 5, 300)


def count(name: str) -> None:
    COUNTS[name] = COUNTS.get(name, 0) + 1


def damaged(draw, content: bytes) -> bytes:
    """Bytes changed, cut out or put in at a few places."""
    content = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(content)


COMPRESS = {"": bytes, ".gz": lambda content: gzip.compress(content, mtime=0), ".zst": pyarrow.Codec("zstd").compress}
# As JSON is written: a value a line, over lines, a list of values over lines, a list a line.
LAYOUTS = [
    lambda values: "\n".join(map(json.dumps, values)),
    lambda values: "\n".join(json.dumps(value, indent=2) for value in values),
    lambda values: json.dumps(values, indent=1),
    lambda values: "\n".join(json.dumps([value]) for value in values),
    lambda values: json.dumps({"rows": values}),
]


def parquet(content: list[dict]) -> bytes:
    try:
        table = pyarrow.Table.from_pylist(content)
        pyarrow.parquet.write_table(table, file := io.BytesIO(), row_group_size=2)
    except (pyarrow.ArrowException, ValueError, OverflowError, TypeError, RecursionError):
        return b"PAR1"  # values of different types in one column
    return file.getvalue()


@st.composite
def files(draw) -> tuple[str, bytes]:
    kind = draw(st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet"]))
    compression = "" if kind == "parquet" else draw(st.sampled_from(list(COMPRESS)))
    name = kind + compression
    if draw(st.booleans()):
        return name, draw(st.binary(max_size=200))
    if kind == "parquet":
        return name, damaged(draw, parquet(draw(st.lists(rows, max_size=8))))
    content = draw(st.sampled_from(LAYOUTS))(draw(st.lists(rows | values, max_size=8))).encode()
    content = bytes(COMPRESS[compression](damaged(draw, content)))
    return name, damaged(draw, content) if draw(st.booleans()) else content


@FUZZED
@given(files(), st.booleans())
def test_data_files(tokenizer, file, strict):
    """Either rows with a label each, every other one counted, or a `DataError` that names the file."""
    count("data files")
    suffix, content = file
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"data.{suffix}"
        path.write_bytes(content)
        try:
            data = prepared(str(path), tokenizer, 64, strict, fraction=0.2)
        except DataError as error:
            assert str(error) and "Traceback" not in str(error)
            return
        for row in [*data.train, *data.heldout]:
            assert any(label != -100 for label in row["labels"][1:])
            assert len(row["input_ids"]) == len(row["labels"]) <= 64
        assert len(data.train) > 0


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)
# with a format's fields, an object that holds a list is a row by itself
json_rows = st.dictionaries(st.text(max_size=3), json_values, max_size=3).map(
    lambda fields: fields | {"prompt": 1, "completion": 2}
)


@settings(FUZZED, max_examples=max(1, EXAMPLES // 3))
@given(
    st.lists(json_rows, min_size=1, max_size=6),
    st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=3),
    st.sampled_from([".jsonl", ".json"]),
    st.sampled_from([1, 5, 2**20]),
)
def test_json_is_read_in_any_layout(content, parts, suffix, chunk):
    """All rows, each at the line on which it begins, however their file is laid out."""
    count("JSON layouts")
    if len(parts) > 1:  # what is read by lines may change its layout in between
        parts = [part for part in parts if part not in (LAYOUTS[2], LAYOUTS[4])] or [LAYOUTS[0]]
    size = -(-len(content) // len(parts))
    text = "\n".join(
        part(content[index * size :][:size]) for index, part in enumerate(parts) if content[index * size :]
    )
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "CHUNK", chunk)
        path = Path(folder) / f"data{suffix}"
        path.write_text(text, encoding="utf-8")
        found = [row for row in iter_records(str(path)) if not isinstance(row, Note)]
        assert [row.fields if isinstance(row, Record) else row for row in found] == content
        for row in found:
            line = text.splitlines()[int(row.where.rsplit(":")[-1]) - 1]
            assert line.lstrip(" [").startswith("{")


KEYS = [*SftOptions.__dataclass_fields__, *SftTrainingArguments.__dataclass_fields__]


@FUZZED
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=12), values, max_size=5))
def test_recipes(recipe):
    """A recipe is parsed, or refused with a sentence; nothing of it is run."""
    count("recipes")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        try:
            options, training = parse_options(["--recipe", str(path)])
        except UserError as error:
            assert str(error)
            return
        assert options.recipe == str(path) and isinstance(training, dict)


@FUZZED
@given(st.binary(max_size=100) | values.map(lambda value: yaml.safe_dump(value).encode("utf-8", "replace")))
def test_files_given_as_recipes(content):
    count("files as recipes")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(content)
        try:
            parse_options(["--recipe", str(path), "--model", "somewhere"])
        except UserError as error:
            assert str(error)


ds_keys = st.sampled_from(
    ["tensor_parallel", "zero_optimization", "stage", "autotp_size", "train_batch_size", "bf16"]
)


@FUZZED
@given(st.dictionaries(ds_keys, values | st.dictionaries(ds_keys, values, max_size=3), max_size=4), st.integers(1, 4))
def test_deepspeed_files(config, tp):
    count("DeepSpeed files")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps(config))
        try:
            deepspeed_config(SftOptions(model="somewhere", tp=tp), str(path), 4)
        except UserError as error:
            assert str(error)


SIZES = st.integers(0, 5)
numbers = st.sampled_from([0, 1, -1, 0.1, 0.5, 1.5, float("nan"), float("inf"), -100, None, "0.1", True])
options = st.fixed_dictionaries(
    {},
    optional={
        "label_smoothing": numbers,
        "ignore_index": numbers,
        "reduction": st.sampled_from(["mean", "sum", "none", "max", None, 1]),
        "num_items_in_batch": numbers | st.sampled_from([torch.tensor(3), torch.tensor([1, 2]), torch.tensor(0)]),
        "z_loss": numbers,
        "logit_softcap": numbers,
        "return_stats": st.booleans(),
        "smoothing_prior": st.none() | SIZES.map(lambda size: torch.full((size,), 1 / max(size, 1))),
    },
)
linear_options = st.fixed_dictionaries({}, optional={"label_tokens": numbers | SIZES, "chunk_bytes": numbers | SIZES})
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64]


@st.composite
def tensors(draw, dtypes=DTYPES) -> torch.Tensor:
    shape = draw(st.lists(SIZES, max_size=3))
    return torch.full(shape, draw(st.integers(-2, 4))).to(draw(st.sampled_from(dtypes)))


shards = st.none() | st.builds(lambda stop, size: (0, stop, size), SIZES, SIZES)


@FUZZED
@given(tensors(), tensors(), tensors(), shards, options, st.none() | linear_options)
def test_arguments_of_the_loss(first, weight, target, bounds, given_options, linear):
    """A loss, or a `ValueError` that says what was expected and what came; never an error from inside."""
    count("arguments of the loss")
    try:
        shard = None if bounds is None else VocabShard(*bounds)
        if linear is None:
            loss = vocab_parallel_cross_entropy(first, target, shard, **given_options)
        else:
            loss = vocab_parallel_linear_cross_entropy(first, weight, target, shard, **given_options, **linear)
    except ValueError as error:
        assert str(error)
        return
    loss = loss[0] if isinstance(loss, tuple) else loss
    assert loss.dtype in (torch.float32, torch.float64)
