"""From an example to a row of token ids and labels.

Prompt and completion are tokenised apart, so no token straddles the seam.
"""

from launch.data.examples.conversation import encode_chat
from launch.data.examples.formats import ChatExample, Example, TokenExample
from launch.data.examples.rows import Row, checked_tokens, join, token_ids
from launch.data.records import DataError


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
