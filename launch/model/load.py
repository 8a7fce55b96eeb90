"""The model of a run: loaded, or built from a configuration, and checked."""

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from launch.common.errors import UserError
from launch.common.library_patches import keep_4bit_weights, weightless, without_tensor_parallel
from launch.common.messages import error_line, typed_error_line
from launch.config.options import SftOptions
from launch.data.tokenizer import check_model_path
from launch.model.adapters import ADAPTER_CONFIG, adapter_as_model
from launch.model.build import build_model
from launch.model.checks import check_loaded, check_trainable
from launch.model.four_bit import quantization
from launch.model.tensor_parallel.problem import split_problem
from launch.model.two_matrices import untie
from launch.model.vocabulary import fit_vocabulary
from launch.process.exit import has_one_line
from launch.process.ranks import say
from smoothing.install import causal_lm, check_model


def load_model(
    options: SftOptions, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    """Load or build the causal LM to train.

    Raises `UserError` if it cannot be loaded, built, or split over `--tp` ranks, if it looks ahead, has fewer
    positions than `--max_length` or fewer rows than the tokenizer; and `UnsupportedModel` if `--head` does not
    support it, as `install_smoothed_loss` would once training has begun.
    """
    model = _loaded(options, dtype) if options.model is not None else build_model(options, tokenizer, dtype, seed)
    check_trainable(model, options)
    fit_vocabulary(model, tokenizer, options.resize_embeddings, seed)
    check_model(causal_lm(model), options.head)
    model.config.use_cache = False
    train_every_row(model)
    return model


def train_every_row(model: PreTrainedModel) -> None:
    """Let the embedding of the padding token learn: it may be that of EOS, and an export says so.

    torch gives the row of `padding_idx` no gradient. Padding itself gets none anyway: nothing attends to it, and
    it has no label.
    """
    embedding = model.get_input_embeddings()
    if getattr(embedding, "padding_idx", None) is not None:
        embedding.padding_idx = None


def _loaded(options: SftOptions, dtype: torch.dtype) -> PreTrainedModel:
    check_model_path(options.model)
    if (Path(options.model) / ADAPTER_CONFIG).exists():
        raise UserError(adapter_as_model(options.model))
    try:
        code = {"trust_remote_code": options.trust_remote_code}
        config = AutoConfig.from_pretrained(options.model, **code)
        if options.tp > 1:
            _check_split(config, options)
        note = untie(config, options.model, options.trust_remote_code)
        with without_tensor_parallel():
            model, found = AutoModelForCausalLM.from_pretrained(
                options.model,
                dtype=dtype,
                **code,
                **({"config": config} if note else {}),
                attn_implementation=options.attn_implementation,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # `check_loaded` names them
                output_loading_info=True,
                quantization_config=quantization(dtype) if options.load_in_4bit else None,
            )
    except StrictDataclassError as error:
        raise UserError(f"--model {options.model}: its config.json: {error_line(error)}") from None
    except Exception as error:  # its files may make a library fail in any way
        if has_one_line(error) and not isinstance(error, OSError | SafetensorError):
            raise
        raise UserError(f"--model {options.model} could not be loaded: {typed_error_line(error)}") from None
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(adapter_as_model(options.model))
    check_loaded(options.model, found)
    if options.load_in_4bit:
        keep_4bit_weights(model)
    if note:
        say(note)
    return model


def _check_split(config: PreTrainedConfig, options: SftOptions) -> None:
    """Raise `UserError` if the model cannot be split over the ranks, before its weights are loaded."""
    with weightless():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=options.trust_remote_code)
    if problem := split_problem(model, options.tp):
        raise UserError(problem)
