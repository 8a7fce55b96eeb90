"""Encoding of examples as rows of token ids and labels."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

import datasets

from launch.common.errors import Reject
from launch.common.messages import one_line
from launch.data.examples.conversation import encode_chat
from launch.data.examples.kinds import ChatExample, Example, PairExample, TokenExample
from launch.data.examples.render import ChatTemplate, row_time_limit
from launch.data.examples.rows import Row, checked_tokens
from launch.data.examples.special_tokens import SpelledOut
from launch.data.examples.text import encode_text
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


class Encoder:
    """Encodes examples as rows with one tokenizer.

    Args:
        tokenizer: With its chat template, if it has one.
        max_length: Longest row in tokens.
        arguments: Variables for the chat template.
        day: The date that the chat template is told, today's if None.
        pairs_as_chat: Write questions and answers with the chat template, where there is one.
    """

    def __init__(
        self,
        tokenizer,
        max_length: int,
        arguments: Mapping[str, Any] | None = None,
        day: date | None = None,
        pairs_as_chat: bool = True,
    ):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.template = ChatTemplate(tokenizer, arguments, day)
        self.pairs_as_chat = pairs_as_chat and bool(tokenizer.chat_template)

    def __call__(self, example: Example) -> Row:
        """Encode one example.

        Raises Reject for a row that cannot be trained on, DataError for a tokenizer that cannot encode it.
        """
        if isinstance(example, TokenExample):
            return checked_tokens(example, len(self.tokenizer), self.max_length)
        check_tokenizer(self.tokenizer, self.max_length)
        with row_time_limit():
            if isinstance(example, PairExample):
                example = example.chat if self.pairs_as_chat else example.text
            if isinstance(example, ChatExample):
                return encode_chat(example, self.template, self.max_length)
            return encode_text(example, self.tokenizer, self.max_length)


def encode(example: Example, tokenizer, max_length: int) -> Row:
    """Encode one example with a tokenizer as it is; see `Encoder`."""
    return Encoder(tokenizer, max_length)(example)


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
    special, encoder = SpelledOut(tokenizer), Encoder(tokenizer, max_length)
    for example in examples:
        try:
            row = encoder(example)
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
