"""From examples to rows of token ids and labels.

Prompt and completion are tokenised apart, so that no token straddles the two.
"""

import hashlib
from dataclasses import dataclass

import datasets

from launch.common.errors import Reject
from launch.common.messages import one_line
from launch.data.examples.conversation import encode_chat
from launch.data.examples.formats import ChatExample, Example, TokenExample
from launch.data.examples.rows import Row, checked_tokens, join, token_ids
from launch.data.examples.special_tokens import SpelledOut
from launch.data.read import Examples
from launch.data.records import DataError, DropReport

COLUMNS = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "where": datasets.Value("string"),
    }
)


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


def encode(example: Example, tokenizer, max_length: int) -> Row:
    """The row of an example.

    Raises Reject for a row that cannot be trained on, DataError for a tokenizer that cannot encode it.
    """
    if isinstance(example, TokenExample):
        return checked_tokens(example, len(tokenizer), max_length)
    check_tokenizer(tokenizer, max_length)
    if isinstance(example, ChatExample):
        return encode_chat(example, tokenizer, max_length)
    prompt, completion = token_ids(example.prompt, tokenizer), token_ids(example.completion, tokenizer)
    return join(prompt, completion, tokenizer, max_length)


def check_tokenizer(tokenizer, max_length: int) -> None:
    """Raises DataError for a tokenizer without an end token, or a length that can hold no label."""
    if tokenizer.eos_token_id is None:
        raise DataError("Expected a tokenizer with an EOS token, the stop to learn; set tokenizer.eos_token.")
    if max_length < 3:
        raise DataError(f"Expected max_length of at least 3 (BOS, a token, EOS), got {max_length}; raise it.")


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
