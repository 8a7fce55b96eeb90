"""What is wrong with a model before it is trained: how it was loaded, and what its configuration allows."""

import torch
from transformers import MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from launch.common.errors import UserError
from launch.common.messages import counted, error_line, shortened
from launch.config.options import SftOptions
from launch.process.device import uses_gpu
from launch.process.ranks import say


def check_trainable(model: PreTrainedModel, options: SftOptions) -> None:
    """Raise `UserError` if the model looks ahead, does not fit --max_length, or could not be saved."""
    _check_causal(model.config)
    _check_length(model.config, options.max_length)
    _check_generation(model)
    _check_attention(model)


def check_loaded(model: str, found: dict) -> None:
    """Raise `UserError` if weights are missing; transformers would draw them at random. Print those it ignores."""
    missing, wrong = sorted(found["missing_keys"]), sorted(found["mismatched_keys"], key=str)
    unknown = sorted(found["unexpected_keys"])
    if missing or wrong:
        named = [*missing, *(str(key[0] if isinstance(key, tuple) else key) for key in wrong)]
        raise UserError(
            f"--model {model} does not hold the weights of its configuration: {shortened(', '.join(named))} "
            f"({len(missing)} missing, {len(wrong)} of another shape, {len(unknown)} unknown); they would be random"
        )
    if unknown:
        say(f"{counted(len(unknown), 'weight')} of {model} not in its configuration: {shortened(', '.join(unknown))}")


def _check_attention(model: PreTrainedModel) -> None:
    """Refuse attention that would fail in the first step."""
    attention = getattr(model.config.get_text_config(), "_attn_implementation", None) or ""
    if attention == "flex_attention" and not uses_gpu():
        raise UserError("flex_attention has no backward pass on a CPU; give --attn_implementation sdpa")
    if "flash" in attention and model.dtype not in (torch.bfloat16, torch.float16):
        raise UserError(f"{attention} takes half precision alone; give --bf16 true, or --attn_implementation sdpa")


def _check_causal(config: PreTrainedConfig) -> None:
    """Refuse an encoder loaded as a decoder: it sees the tokens that it is to predict, and its loss goes to 0."""
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False:
        raise UserError(
            f"{config.model_type} is an encoder, which looks ahead; its configuration needs is_decoder true"
        )
    if getattr(config.get_text_config(), "use_bidirectional_attention", None) in (True, "all"):
        raise UserError(
            f"{config.model_type} looks ahead with use_bidirectional_attention, at the tokens that it is to predict; "
            "its configuration needs it false"
        )


def _check_length(config: PreTrainedConfig, max_length: int) -> None:
    limit = _positions(config.get_text_config())
    if limit is not None and max_length > limit:
        raise UserError(
            f"--max_length {max_length} is more than the model's max_position_embeddings {limit}; use at most {limit}"
        )


def _positions(config: PreTrainedConfig) -> int | None:
    """Return how many positions a model has, with those that a scaling of its rotary embedding adds."""
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    for scaling in (rope, *rope.values()):  # one for all layers, or one for each type of layer
        if isinstance(scaling, dict) and isinstance(factor := scaling.get("factor"), int | float):
            limit = max(limit, int(factor * (scaling.get("original_max_position_embeddings") or limit)))
    return limit


def _check_generation(model: PreTrainedModel) -> None:
    """Refuse a generation configuration that cannot be saved, as it is with every checkpoint."""
    try:
        if model.generation_config is not None:
            model.generation_config.validate(strict=True)
    except Exception as error:
        raise UserError(
            f"generation_config.json of the model cannot be saved again: {error_line(error)} Correct "
            "it (temperature and top_p need do_sample true), or remove the file"
        ) from None
