"""The texts that a tokenizer is trained on."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice

from launch.common.errors import Reject
from launch.data.examples.columns import Columns
from launch.data.examples.formats import detect_format, to_example
from launch.data.examples.kinds import ChatExample, PairExample, TextExample
from launch.data.read import Source
from launch.data.records import DataError, Record


def training_texts(
    sources: Iterable[Source], columns: Columns | None = None, most: int | None = None
) -> Iterator[str]:
    """Yield the texts of the first `most` rows of each source, or of all; some columns are read under other names.

    Raises DataError for rows that are tokenised already.
    """
    for source in sources:
        for texts in islice(_rows(source, columns or Columns()), most):
            yield from texts


def _rows(source: Source, columns: Columns) -> Iterator[list[str]]:
    for record in source.records():
        if not isinstance(record, Record):
            continue
        with suppress(Reject):  # which is counted when rows are encoded
            fields = columns.rename(record.fields)
            if format := detect_format(fields):
                yield list(_texts(to_example(Record(fields, record.where), format)))


def _texts(example) -> Iterator[str]:
    if isinstance(example, PairExample):
        example = example.text
    if isinstance(example, TextExample):
        yield example.prompt + example.completion
    elif isinstance(example, ChatExample):
        yield from (message["content"] for message in example.messages)
    else:
        raise DataError(
            f"{example.where} is tokenised already, so no tokenizer can be trained on it; use the tokenizer it was "
            "made with."
        )
