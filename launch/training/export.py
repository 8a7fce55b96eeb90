"""The trained model, consolidated from all ranks, as Hugging Face's `from_pretrained` reads it."""

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from launch.common.paths import MODEL, MODEL_CARD, MODEL_PARTIAL, SMOOTHING_PRIOR
from launch.model.adapters import PEFT_PREFIX, is_adapted
from launch.process.ranks import from_main
from launch.run.checkpoints import flush
from launch.training.nonfinite import check_weights
from launch.training.trained_weights import trained_weights
from launch.training.trainer import SftTrainer
from smoothing.install import causal_lm


def export(
    trainer: SftTrainer,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str,
    label_smoothing: float,
    card: str,
    merge: bool = False,
) -> Path:
    """Write `output_dir/model` from all ranks' shards, whole or not at all. All ranks must call this.

    A whole model's configuration tells its label smoothing, and names the file of its prior where the run has one.

    `card` is its `README.md`. Of a model with adapters these are written alone, for peft; with `merge` a whole model
    that they are merged into.

    Raises `RuntimeError` if a weight is missing or has another shape than in its configuration, and `UserError` if a
    weight has become infinite or NaN since training began.
    """
    partial, final = Path(output_dir) / MODEL_PARTIAL, Path(output_dir) / MODEL
    adapted = is_adapted(trainer.model)
    if adapted:
        from launch.training import adapter_weights  # needs peft

    if adapted and not merge:
        weights = trained_weights(trainer.deepspeed)
    else:
        weights = trainer.accelerator.get_state_dict(trainer.deepspeed)

    def write() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        model = causal_lm(trainer.model)
        model.config.use_cache = True
        model.config.label_smoothing = label_smoothing  # so that it can be taken out again
        prior = Path(output_dir) / SMOOTHING_PRIOR
        if prior.exists():
            model.config.smoothing_prior = SMOOTHING_PRIOR
        elif hasattr(model.config, "smoothing_prior"):  # of an export that was trained further
            del model.config.smoothing_prior
        # ZeRO 3 gathers tied weights one by one, as copies; from_pretrained ties them again
        tied = {f"{PEFT_PREFIX if adapted else ''}{name}" for name in tied_names(model)}
        once = {name: weight for name, weight in weights.items() if name not in tied}
        check_weights(once.items(), trainer.not_finite, "no model is exported")
        if adapted and not merge:
            adapter_weights.check_adapter(trainer.model, once)
            adapter_weights.save_adapter(trainer.model, once, partial)
        else:
            if adapted:
                merged = adapter_weights.merged(trainer.model, once)
                once = {name: weight for name, weight in merged.items() if name not in tied_names(model)}
            assert_complete(once, type(model), model.config)
            model.save_pretrained(partial, state_dict=once)
            if prior.exists():
                shutil.copy(prior, partial)
        tokenizer.save_pretrained(partial)
        (partial / MODEL_CARD).write_text(card, encoding="utf-8")
        flush(partial)
        partial.rename(final)

    from_main(write)
    return final


def tied_names(model: PreTrainedModel) -> set[str]:
    """Return the names of weights that are tied to another weight, and are not written."""
    return set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()


def assert_complete(weights: dict[str, torch.Tensor], model_class: type, config) -> None:
    """Raise `RuntimeError` unless names and shapes are those of a model built anew from the configuration."""
    with torch.device("meta"):
        # the class itself: under ZeRO 3 `from_config` would partition the model, with collectives, on this rank alone
        model = model_class(config)
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    got = {name: tuple(weight.shape) for name, weight in weights.items()}
    missing = wanted.keys() - got.keys() - tied_names(model)
    wrong = {name: (shape, wanted.get(name)) for name, shape in got.items() if wanted.get(name) != shape}
    if missing or wrong:
        raise RuntimeError(
            f"the weights to export are not complete: missing {sorted(missing)}, (got, expected) {wrong}"
        )
