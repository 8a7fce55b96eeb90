"""Where generation stops: at the tokens that training has taught to end an answer with."""

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def stop_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, learned: Sequence[int]) -> None:
    """Set the stops of the model's `generation_config`, which is exported with it.

    Args:
        model: Its own stops stay, behind the others.
        tokenizer: Its BOS and padding are named too; its EOS is a stop.
        learned: The tokens that end the answers it was trained on.
    """
    config = model.generation_config
    if config is None:
        return
    own = config.eos_token_id
    before = own if isinstance(own, list) else [own]
    stops = [token for token in dict.fromkeys([*learned, tokenizer.eos_token_id, *before]) if token is not None]
    config.eos_token_id = stops if len(stops) > 1 else stops[0]
    config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.bos_token_id is not None:
        config.bos_token_id = tokenizer.bos_token_id
