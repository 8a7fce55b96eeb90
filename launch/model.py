"""The model and tokenizer of a run: loaded, or built from a configuration and trained on the data."""

import difflib
from contextlib import contextmanager

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import deepspeed_config

from launch.data.tokenization import train_tokenizer
from launch.errors import UserError
from launch.options import SftOptions
from smoothing.install import causal_lm, check_model


def load_tokenizer(options: SftOptions, texts) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or one trained on `texts()`."""
    if options.model is None:
        return train_tokenizer(texts(), options.tokenizer_size)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as fault:
        raise UserError(f"no tokenizer could be loaded from --model {options.model}: {_first_line(fault)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {options.model} has no end-of-sequence token, so nothing could learn to stop"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked out of attention and of the loss
    return tokenizer


def load_model(
    options: SftOptions, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    """The causal LM to train.

    Raises `UserError` if it cannot be loaded, built, or split over `--tp` ranks, and `UnsupportedModel` if it is none
    for `--head`, as `install_smoothed_loss` would once training has begun.
    """
    model = _loaded(options, dtype) if options.model is not None else _built(options, tokenizer, dtype, seed)
    _check_split(model.config, options.tp)
    _check_vocabulary(model.config, tokenizer)
    check_model(causal_lm(model), options.head)
    model.config.use_cache = False
    return model


def _loaded(options: SftOptions, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with _without_tensor_parallel():
            return AutoModelForCausalLM.from_pretrained(
                options.model, dtype=dtype, trust_remote_code=options.trust_remote_code
            )
    except (OSError, ValueError) as fault:
        raise UserError(f"--model {options.model} could not be loaded: {_first_line(fault)}") from None


@contextmanager
def _without_tensor_parallel():
    """Load as if there were no tensor parallelism; DeepSpeed splits the layers later, in `initialize`.

    transformers 5.23 refuses to load any checkpoint under ZeRO 3 whose model has weight renamings while the
    configuration speaks of tensor parallelism, though the renamings are made on whole weights.
    """
    config = deepspeed_config() or {}
    hidden = config.pop("tensor_parallel", None)
    try:
        yield
    finally:
        if hidden is not None:
            config["tensor_parallel"] = hidden


def _built(options: SftOptions, tokenizer, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    values = dict(options.model_config)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise UserError("--model_config needs a model_type, for example llama")
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    try:
        values = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | special | values
        config = AutoConfig.for_model(model_type, **values)
        _check_keys(options.model_config, type(config))
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, TypeError, StrictDataclassError) as fault:
        raise UserError(f"--model_config: {_first_line(fault)}") from None


def _check_keys(given: dict, config_class: type) -> None:
    """transformers takes a misspelt key in silence, and the model is not the one that was asked for."""
    known = config_class().to_dict().keys() | config_class.attribute_map.keys()
    for name in given.keys() - known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"--model_config: unknown key {name!r} for {config_class.model_type}{hint}")


def _check_split(config, tp: int) -> None:
    """A model can be split unevenly over its attention heads, but not over more ranks than it has."""
    heads = getattr(config.get_text_config(), "num_attention_heads", None)
    if heads is not None and tp > heads:
        raise UserError(f"--tp {tp} is more than the model's {heads} attention heads; use at most {heads}")


def _check_vocabulary(config, tokenizer: PreTrainedTokenizerBase) -> None:
    size = config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens and the model a vocabulary of {size}; resize the model's "
            "embeddings, or take the tokenizer that came with it"
        )


def _first_line(fault: Exception) -> str:
    return (str(fault).strip() or type(fault).__name__).splitlines()[0]
