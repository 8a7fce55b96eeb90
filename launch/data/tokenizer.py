"""The tokenizer of a run: the model's own, or one trained on the data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launch.common.errors import UserError
from launch.common.messages import error_line, typed_error_line
from launch.config.chat_template import NONE, read_chat_template
from launch.config.columns import column_names
from launch.config.options import SftOptions
from launch.data.cache import Cache, fingerprint
from launch.data.examples.columns import Columns
from launch.data.read import Source
from launch.data.train_tokenizer import learn_pieces, tokenizer_of
from launch.data.training_texts import training_texts

PIECES = "pieces.json"


def train_once(options: SftOptions, cache: Cache, sources: Sequence[Source]) -> Path:
    """Return the file of the pieces that a tokenizer learned from the sources, now or in an earlier run."""

    columns = Columns(column_names(options.columns))

    def make(folder: Path) -> None:
        pieces = learn_pieces(training_texts(sources, columns, options.max_rows), options.tokenizer_size)
        (folder / PIECES).write_text(json.dumps(pieces))

    made_from = [(source.name, source.fingerprint()) for source in sources]
    facts = {
        "pieces of": made_from,
        "columns": columns.renamed,
        "max_rows": options.max_rows,
        "size": options.tokenizer_size,
        "sentencepiece": sentencepiece.__version__,
    }
    return cache.find_or_make(fingerprint(facts), _damage, make)[0] / PIECES


def _damage(folder: Path) -> str | None:
    try:
        json.loads((folder / PIECES).read_text())
    except (OSError, ValueError) as error:
        return str(error)
    return None


def load_tokenizer(options: SftOptions, pieces: Path | None = None) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, or the one with these pieces if there is no model, with the flags' template."""
    tokenizer = _load(options, pieces)
    if options.chat_template not in (None, NONE):
        tokenizer.chat_template = read_chat_template(options.chat_template)
    if problem := _kwargs_problem(options, tokenizer):
        raise UserError(f"--chat_template_kwargs: {problem}")
    return tokenizer


def _kwargs_problem(options: SftOptions, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What to say of settings that no template would read."""
    if not options.chat_template_kwargs:
        return None
    if not tokenizer.chat_template:
        return "the tokenizer has no chat template; give --chat_template FILE"
    templates = tokenizer.chat_template
    text = " ".join(templates.values()) if isinstance(templates, dict) else templates
    unread = [name for name in options.chat_template_kwargs if name not in text]
    return f"the chat template never reads {unread[0]!r}" if unread else None


def _load(options: SftOptions, pieces: Path | None) -> PreTrainedTokenizerBase:
    if options.model is None:
        assert pieces is not None
        return tokenizer_of(json.loads(pieces.read_text()), options.tokenizer_size)
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


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return all that rows depend on."""
    if tokenizer.is_fast:
        algorithm = tokenizer.backend_tokenizer.to_str()
    else:
        algorithm = json.dumps([tokenizer.get_vocab(), repr(tokenizer.init_kwargs)], sort_keys=True)
    return {
        "class": type(tokenizer).__qualname__,
        "algorithm": algorithm,
        "special tokens": tokenizer.special_tokens_map,
        "chat template": tokenizer.chat_template,
    }


def check_model_path(model: str) -> None:
    """Raise `UserError` for a path that does not exist: transformers would take it for a hub name."""
    path = Path(model)
    if path.is_file():
        raise UserError(f"--model {model} is a file; name its directory")
    if not path.exists() and (model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1):
        raise UserError(f"--model {model}: no such directory")
