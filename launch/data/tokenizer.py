"""The tokenizer of a run: the model's own, or one trained on the data."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launch.common.errors import UserError
from launch.common.messages import error_line, typed_error_line
from launch.config.options import SftOptions
from launch.data.train_tokenizer import train_tokenizer


def load_tokenizer(options: SftOptions, texts: Callable[[], list[str]]) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, or train one on `texts()`."""
    if options.model is None:
        return train_tokenizer(texts(), options.tokenizer_size)
    check_model_path(options.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
    except StrictDataclassError as error:
        raise UserError(f"--model {options.model}: its config.json: {error_line(error)}") from None
    except Exception as error:  # damaged files make libraries raise errors of many types
        raise UserError(
            f"no tokenizer could be loaded from --model {options.model}: {typed_error_line(error)}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {options.model} has no end-of-sequence token, so the model could not learn to stop; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked out of attention and of the loss
    return tokenizer


def check_model_path(model: str) -> None:
    """Raise `UserError` for a path that does not exist: transformers would take it for a hub name."""
    path = Path(model)
    if path.is_file():
        raise UserError(f"--model {model} is a file; name its directory")
    if not path.exists() and (model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1):
        raise UserError(f"--model {model}: no such directory")
