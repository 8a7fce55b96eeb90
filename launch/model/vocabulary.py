"""Whether a model has a row for each token of its tokenizer, and rows that are added to it."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from launch.common.errors import UserError
from launch.common.messages import error_line
from launch.process.ranks import say


def fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, resize: bool, seed: int) -> None:
    """Add rows for tokens that the model's embedding and output head do not have, drawn from `seed` on all ranks.

    Raises:
        UserError: if there are such tokens and `resize` is false, or the model cannot be resized.

    Collectives:
        Under ZeRO 3 those that gather the two matrices, where rows are added.
    """
    size = model.config.get_text_config().vocab_size
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest < size:
        return
    if not resize:
        gaps = f", with gaps in their ids: {token!r} has {largest}," if len(tokenizer) <= size else ""
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens{gaps} and the model a vocabulary of {size}; "
            f"--resize_embeddings true adds the {largest + 1 - size} rows that are missing; or use the tokenizer "
            "that came with it"
        )
    torch.manual_seed(seed)
    try:
        model.resize_token_embeddings(largest + 1, mean_resizing=True)
    except (NotImplementedError, TypeError, AttributeError) as error:  # of embeddings that are no plain ones
        raise UserError(
            f"--resize_embeddings: transformers cannot resize {type(model).__name__}: {error_line(error)}"
        ) from None
    say(
        f"--resize_embeddings: {largest + 1 - size:,} rows are added to the {size:,} of embedding and output head; "
        "they begin at the mean of the others"
    )
