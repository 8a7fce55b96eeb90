"""The trained model, consolidated from all ranks, as Hugging Face's `from_pretrained` wants it."""

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from launch.processes import from_main

MODEL = "model"


def export(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, output_dir: str) -> Path:
    """Write `output_dir/model` from all ranks' shards; it appears whole or not at all. All ranks must call it.

    Raises `RuntimeError` if a weight is missing or has another shape than its configuration says.
    """
    partial, final = Path(output_dir) / f"{MODEL}.partial", Path(output_dir) / MODEL
    weights = trainer.accelerator.get_state_dict(trainer.deepspeed)

    def write() -> None:
        model = trainer.model
        model.config.use_cache = True
        # ZeRO 3 gathers tied weights one by one, as copies; from_pretrained ties them again
        once = {name: weight for name, weight in weights.items() if name not in tied_names(model)}
        model.save_pretrained(partial, state_dict=once)
        tokenizer.save_pretrained(partial)
        assert_complete(partial, type(model))
        partial.rename(final)

    from_main(write)
    return final


def tied_names(model: PreTrainedModel) -> set[str]:
    """Names of weights that are another weight's, and are not written."""
    return set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()


def assert_complete(directory: Path, model_class: type) -> None:
    """Hold the shapes in the files' headers to those of a model built from the configuration beside them."""
    with torch.device("meta"):
        # the class itself: under ZeRO 3 `from_config` would partition the model, with collectives, on this rank alone
        model = model_class(AutoConfig.from_pretrained(directory))
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    written = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            written |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    missing = wanted.keys() - written.keys() - tied_names(model)
    wrong = {name: (shape, wanted.get(name)) for name, shape in written.items() if wanted.get(name) != shape}
    if missing or wrong:
        raise RuntimeError(
            f"the export in {directory} is not whole: missing {sorted(missing)}, (got, expected) {wrong}"
        )
