"""Encoding of examples as rows of token ids and labels.

Prompt and completion are tokenised separately, so that no token straddles the two.
"""

import hashlib
from dataclasses import dataclass

import datasets

from launch.common.errors import Reject
from launch.common.messages import one_line
from launch.data.examples.conversation import encode_chat
from launch.data.examples.kinds import ChatExample, Example, PairExample, TokenExample
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
        """Return the SHA-256 of the training rows: tokens, labels and row boundaries, in order."""
        digest = hashlib.sha256()
        for name in ("input_ids", "labels"):
            for chunk in self.train.data.column(name).chunks:
                digest.update(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
                digest.update(chunk.value_lengths().to_numpy(zero_copy_only=False).tobytes())
        return digest.hexdigest()


def encode_examples(examples: Examples, tokenizer, max_length: int, strict: bool = False) -> EncodedData:
    """Encode both splits; rows that cannot be encoded are added to the examples' report.

    Raises DataError if no training row is usable, or when `strict` for the first unusable row.
    """
    report = examples.report
    train = _encode_split(examples.train, tokenizer, max_length, report, strict)
    heldout = _encode_split(examples.heldout, tokenizer, max_length, report, strict)
    if not len(train):
        raise DataError(f"No training rows are left; change the data or max_length.\n{report.summary()}")
    return EncodedData(train, heldout, report)


def encode(example: Example, tokenizer, max_length: int) -> Row:
    """Encode one example as a row.

    Raises Reject for a row that cannot be trained on, DataError for a tokenizer that cannot encode it.
    """
    if isinstance(example, TokenExample):
        return checked_tokens(example, len(tokenizer), max_length)
    check_tokenizer(tokenizer, max_length)
    if isinstance(example, ChatExample):
        return encode_chat(example, tokenizer, max_length)
    if isinstance(example, PairExample):
        example = example.text
    prompt, completion = token_ids(example.prompt, tokenizer), token_ids(example.completion, tokenizer)
    return join(prompt, completion, tokenizer, max_length)


def check_tokenizer(tokenizer, max_length: int) -> None:
    """Raise DataError for a tokenizer without an EOS token, or a length without room for a label."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            "Expected a tokenizer with an EOS token, which the model learns to stop with; set tokenizer.eos_token."
        )
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
