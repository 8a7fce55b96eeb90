"""Encoding of examples as rows of token ids and labels.

Prompt and completion are tokenised separately, so that no token straddles the two.
"""

from launch.data.examples.conversation import encode_chat
from launch.data.examples.kinds import ChatExample, Example, PairExample, TokenExample
from launch.data.examples.rows import Row, checked_tokens, join, token_ids
from launch.data.records import DataError


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
