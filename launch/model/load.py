"""The model of a run: loaded, or built from a configuration, and checked."""

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from launch.common.errors import UserError
from launch.common.library_patches import without_tensor_parallel
from launch.common.messages import error_line, shortened, typed_error_line
from launch.config.options import SftOptions
from launch.data.tokenizer import check_model_path
from launch.model.build import build_model
from launch.process.exit import has_one_line
from launch.process.ranks import say
from smoothing.install import causal_lm, check_model


def load_model(
    options: SftOptions, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    """The causal LM to train.

    Raises `UserError` if it cannot be loaded, built, or split over `--tp` ranks, if it looks ahead or knows fewer
    positions than `--max_length`, and `UnsupportedModel` if it is none for `--head`, as `install_smoothed_loss` would
    once training has begun.
    """
    model = _loaded(options, dtype) if options.model is not None else build_model(options, tokenizer, dtype, seed)
    _check_causal(model.config)
    _check_length(model.config, options.max_length)
    _check_split(model.config, options.tp)
    _check_vocabulary(model.config, tokenizer)
    _check_generation(model)
    check_model(causal_lm(model), options.head)
    model.config.use_cache = False
    return model


def _loaded(options: SftOptions, dtype: torch.dtype) -> PreTrainedModel:
    check_model_path(options.model)
    try:
        with without_tensor_parallel():
            model, found = AutoModelForCausalLM.from_pretrained(
                options.model,
                dtype=dtype,
                trust_remote_code=options.trust_remote_code,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # `_check_loaded` names them
                output_loading_info=True,
            )
    except StrictDataclassError as fault:
        raise UserError(f"--model {options.model}: its config.json: {error_line(fault)}") from None
    except Exception as fault:  # whatever its files make a library stumble over
        if has_one_line(fault) and not isinstance(fault, OSError | SafetensorError):
            raise
        raise UserError(f"--model {options.model} could not be loaded: {typed_error_line(fault)}") from None
    _check_loaded(options.model, found)
    return model


def _check_loaded(model: str, found: dict) -> None:
    """transformers makes up weights that a file does not hold, at random, and passes over those it does not know."""
    missing, wrong = sorted(found["missing_keys"]), sorted(found["mismatched_keys"], key=str)
    unknown = sorted(found["unexpected_keys"])
    if missing or wrong:
        named = [*missing, *(str(key[0] if isinstance(key, tuple) else key) for key in wrong)]
        raise UserError(
            f"--model {model} does not hold the weights of its configuration: {shortened(', '.join(named))} "
            f"({len(missing)} missing, {len(wrong)} of another shape, {len(unknown)} unknown); they would be random"
        )
    if unknown:
        say(f"{len(unknown)} weights of {model} have no place in its configuration: {shortened(', '.join(unknown))}")


def _check_causal(config) -> None:
    """An encoder that is asked for as a decoder sees the tokens that it is to predict, and its loss goes to 0."""
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False:
        raise UserError(
            f"{config.model_type} is an encoder, which looks ahead; its configuration needs is_decoder true"
        )
    if getattr(config.get_text_config(), "use_bidirectional_attention", None) in (True, "all"):
        raise UserError(
            f"{config.model_type} looks ahead with use_bidirectional_attention, at the tokens that it is to predict; "
            "its configuration needs it false"
        )


def _check_length(config, max_length: int) -> None:
    limit = _positions(config.get_text_config())
    if limit is not None and max_length > limit:
        raise UserError(
            f"--max_length {max_length} is more than the model's max_position_embeddings {limit}; use at most {limit}"
        )


def _positions(config) -> int | None:
    """The positions that a model knows, with those that a scaling of its rotary embedding adds."""
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    for scaling in (rope, *rope.values()):  # one for all layers, or one for each type of layer
        if isinstance(scaling, dict) and isinstance(factor := scaling.get("factor"), int | float):
            limit = max(limit, int(factor * (scaling.get("original_max_position_embeddings") or limit)))
    return limit


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


def _check_generation(model: PreTrainedModel) -> None:
    """It is saved with each checkpoint, and only then looked at."""
    try:
        if model.generation_config is not None:
            model.generation_config.validate(strict=True)
    except Exception as fault:
        raise UserError(
            f"generation_config.json of the model cannot be saved again: {error_line(fault)} Mend it "
            "(do_sample true goes with temperature and top_p), or remove the file"
        ) from None
