"""From sources to examples: read, recognise the format, and split off held-out rows."""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from launch.common.errors import Reject
from launch.common.messages import shortened
from launch.data.examples.formats import detect_format, known_formats, to_example
from launch.data.examples.kinds import ChatExample, Example, PairExample, TextExample
from launch.data.records import DataError, DropReport, Record
from launch.data.sources.files import read_records
from launch.data.sources.stdlib_docstrings import docstring_corpus

SMALLEST_SPLIT = 20


@dataclass
class Examples:
    """Both splits before tokenisation; `format` and `notes` are for the log."""

    train: list[Example]
    heldout: list[Example]
    format: str
    report: DropReport
    notes: list[str] = field(default_factory=list)


def read_examples(
    source: str | None,
    eval_source: str | None = None,
    strict: bool = False,
    eval_fraction: float = 0.05,
    seed: int = 0,
) -> Examples:
    """Read the examples of a source, and held-out ones from `eval_source` or a seeded fraction of the source.

    Raises DataError if no row is usable, or when `strict` for the first unusable row.
    """
    if not 0 <= eval_fraction < 1:
        raise DataError(f"Expected eval_fraction in [0, 1), got {eval_fraction}.")
    report, notes = DropReport(), []
    formats: Counter[str] = Counter()
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


def training_texts(examples: Iterable[Example]) -> list[str]:
    """Return the texts to train a tokenizer on. Raises DataError for rows that are tokenised already."""
    texts = []
    for example in examples:
        if isinstance(example, PairExample):
            example = example.text
        if isinstance(example, TextExample):
            texts.append(example.prompt + example.completion)
        elif isinstance(example, ChatExample):
            texts += [message["content"] for message in example.messages]
        else:
            raise DataError(
                f"{example.where} is tokenised already, so no tokenizer can be trained on it; use the "
                "tokenizer it was made with."
            )
    return texts


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
        found = shortened(", ".join(map(str, records[0].fields)))
        raise DataError(
            f"No format is recognised. {records[0].where} has the fields {found}; "
            f"expected one of: {known_formats()}. Rename the fields."
        )
    raise DataError(f"No training rows are left; fix the rows named here.\n{report.summary()}")


def _split(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split into training and held-out rows, both in their original order; `seed` draws the held-out ones."""
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
