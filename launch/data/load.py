"""The data of a run, from its source to two encoded splits: read, recognise, split, encode."""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import datasets

from launch.common.errors import Reject
from launch.common.messages import one_line, shortened
from launch.data.examples.encoding import encode
from launch.data.examples.formats import FORMATS, ChatExample, Example, TextExample, detect_format, to_example
from launch.data.examples.rows import IGNORED
from launch.data.examples.special_tokens import SpelledOut
from launch.data.records import DataError, DropReport, Record
from launch.data.sources.files import read_records
from launch.data.sources.stdlib_docstrings import docstring_corpus
from launch.data.train_tokenizer import train_tokenizer

SMALLEST_SPLIT = 20
COLUMNS = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "where": datasets.Value("string"),
    }
)


@dataclass
class Examples:
    """Both splits before tokenisation; `format` and `notes` are for the log."""

    train: list[Example]
    heldout: list[Example]
    format: str
    report: DropReport
    notes: list[str] = field(default_factory=list)


@dataclass
class EncodedData:
    """Both splits with the columns input_ids, labels and where."""

    train: datasets.Dataset
    heldout: datasets.Dataset
    report: DropReport

    def digest(self) -> str:
        """SHA-256 of the rows to train on: tokens and labels, in their order."""
        found = hashlib.sha256()
        for name in ("input_ids", "labels"):
            for chunk in self.train.data.column(name).chunks:
                found.update(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
                found.update(chunk.value_lengths().to_numpy(zero_copy_only=False).tobytes())
        return found.hexdigest()


@dataclass
class SftData:
    """All that a run needs to know of its data."""

    train: datasets.Dataset
    heldout: datasets.Dataset
    tokenizer: object
    format: str
    report: DropReport
    notes: list[str]


def load_sft_data(
    source: str | None,
    *,
    eval_source: str | None = None,
    tokenizer=None,
    vocab_size: int = 4096,
    max_length: int = 512,
    strict: bool = False,
    eval_fraction: float = 0.05,
    seed: int = 0,
) -> SftData:
    """Data of `source` (None: docstrings of the standard library); no tokenizer: one is trained on it.

    Raises DataError.
    """
    examples = read_examples(source, eval_source, strict, eval_fraction, seed)
    tokenizer = tokenizer or train_tokenizer(training_texts(examples.train), vocab_size)
    data = encode_examples(examples, tokenizer, max_length, strict)
    return SftData(data.train, data.heldout, tokenizer, examples.format, data.report, examples.notes)


def read_examples(
    source: str | None,
    eval_source: str | None = None,
    strict: bool = False,
    eval_fraction: float = 0.05,
    seed: int = 0,
) -> Examples:
    """Examples of a source, and of another or a seeded fraction of the first as held-out ones.

    Raises DataError for no usable rows, or when `strict` for the first unusable one.
    """
    if not 0 <= eval_fraction < 1:
        raise DataError(f"Expected eval_fraction in [0, 1), got {eval_fraction}.")
    report, formats, notes = DropReport(), Counter(), []
    if source is None:
        corpus = docstring_corpus()
        records, heldout_records = corpus.train, corpus.heldout
        notes.append("no data given: docstrings of the Python standard library, whole modules held out")
        if corpus.unparsable:
            notes.append(f"{corpus.unparsable} files of the standard library could not be parsed")
    else:
        records, heldout_records = read_records(source, report, strict), []
    if eval_source is not None:
        heldout_records = read_records(eval_source, report, strict, held_out=True)
    train = _to_examples(records, formats, report, strict)
    heldout = _to_examples(heldout_records, formats, report, strict)
    _require_rows(train, records, report)
    if eval_source is not None and not heldout:
        raise DataError(f"No usable held-out rows in {eval_source!r}:\n{report.summary()}")
    if source is not None and eval_source is None:
        train, heldout = _split(train, eval_fraction, seed)
        if not heldout:
            notes.append(f"nothing held out: {len(train)} rows (fewer than {SMALLEST_SPLIT}, or eval_fraction 0)")
    return Examples(train, heldout, _describe_formats(formats), report, notes)


def encode_examples(examples: Examples, tokenizer, max_length: int, strict: bool = False) -> EncodedData:
    """Both splits encoded; rows that cannot be are added to the examples' report.

    Raises DataError for no usable training rows, or when `strict` for the first unusable row.
    """
    report = examples.report
    train = _encode_split(examples.train, tokenizer, max_length, report, strict)
    heldout = _encode_split(examples.heldout, tokenizer, max_length, report, strict)
    if not len(train):
        raise DataError(f"No training rows are left; change the data or max_length.\n{report.summary()}")
    return EncodedData(train, heldout, report)


def training_texts(examples: Iterable[Example]) -> list[str]:
    """The texts that a tokenizer is trained on. Raises DataError for rows that are tokens already."""
    texts = []
    for example in examples:
        if isinstance(example, TextExample):
            texts.append(example.prompt + example.completion)
        elif isinstance(example, ChatExample):
            texts += [message["content"] for message in example.messages]
        else:
            raise DataError(
                f"{example.where} is tokenised already, so no tokenizer can be trained on it; name the one "
                "it was made with."
            )
    return texts


def describe_example(row: Mapping, tokenizer) -> str:
    """A row for the eye: its place, its token counts, what is read and what is learned."""
    ids, labels = row["input_ids"], row["labels"]
    learned = sum(label != IGNORED for label in labels[1:])
    lines = [f"{row.get('where', 'row')}: {len(ids)} tokens, {learned} of them learned"]
    start = 0
    for position in range(1, len(ids) + 1):
        inside = labels[start] != IGNORED
        if position == len(ids) or (labels[position] != IGNORED) != inside:
            text = tokenizer.decode(ids[start:position], skip_special_tokens=False)
            lines.append(f"  {'learned' if inside else 'read   '} | {text!r}")
            start = position
    return "\n".join(lines)


def _to_examples(records: list[Record], formats: Counter[str], report: DropReport, strict: bool) -> list[Example]:
    examples = []
    for record in records:
        format = detect_format(record.fields)
        try:
            if format is None:
                raise Reject("unrecognised fields", shortened(", ".join(map(str, record.fields))) or "none")
            examples.append(to_example(record, format))
            formats[format] += 1
        except Reject as reject:
            report.add(record.where, reject, strict)
    return examples


def _require_rows(train: list[Example], records: list[Record], report: DropReport) -> None:
    if train:
        return
    if records and all(detect_format(record.fields) is None for record in records):
        known = "; ".join(f"{format} ({', '.join(names)})" for format, names in FORMATS.items())
        found = shortened(", ".join(map(str, records[0].fields)))
        raise DataError(
            f"No format is recognised. {records[0].where} has the fields {found}; "
            f"expected one of: {known}. Rename the fields."
        )
    raise DataError(f"No training rows are left; fix the rows named here.\n{report.summary()}")


def _split(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out rows in their order, the latter drawn by `seed`."""
    if len(examples) < SMALLEST_SPLIT or not fraction:
        return examples, []
    count = min(max(1, round(len(examples) * fraction)), len(examples) - 1)
    drawn = set(random.Random(seed).sample(range(len(examples)), count))
    train = [example for index, example in enumerate(examples) if index not in drawn]
    return train, [examples[index] for index in sorted(drawn)]


def _describe_formats(formats: Counter[str]) -> str:
    if len(formats) == 1:
        return next(iter(formats))
    return "mixed: " + ", ".join(f"{format} ({count} rows)" for format, count in formats.most_common())


def _encode_split(
    examples: list[Example], tokenizer, max_length: int, report: DropReport, strict: bool
) -> datasets.Dataset:
    columns: dict[str, list] = {name: [] for name in COLUMNS}
    special = SpelledOut(tokenizer)
    for example in examples:
        try:
            row = encode(example, tokenizer, max_length)
        except Reject as reject:
            report.add(example.where, reject, strict)
            continue
        if row["prompt_tokens_cut"]:
            report.truncated.append(example.where)
        if token := special.first(example):
            report.spelled_out[example.where] = token
        columns["input_ids"].append(row["input_ids"])
        columns["labels"].append(row["labels"])
        columns["where"].append(one_line(example.where))
    return datasets.Dataset.from_dict(columns, features=COLUMNS)
