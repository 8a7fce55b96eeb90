"""The trained model, consolidated from all ranks, as Hugging Face's `from_pretrained` wants it."""

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer

from launch.processes import from_main

MODEL = "model"


def export(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, output_dir: str) -> Path:
    """Write `output_dir/model` from all ranks' shards; it appears whole or not at all. All ranks must call it.

    Raises `RuntimeError` if a weight is missing or has another shape than its configuration says.
    """
    partial, final = Path(output_dir) / f"{MODEL}.partial", Path(output_dir) / MODEL
    trainer.model.config.use_cache = True
    trainer.save_model(str(partial))

    def finish() -> None:
        tokenizer.save_pretrained(partial)
        assert_complete(partial)
        partial.rename(final)

    from_main(finish)
    return final


def assert_complete(directory: Path) -> None:
    """Hold the shapes in the files' headers to those of a model built from the configuration beside them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {}) if model.config.tie_word_embeddings else set()
    written = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            written |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    missing = wanted.keys() - written.keys() - tied
    wrong = {name: (shape, wanted.get(name)) for name, shape in written.items() if wanted.get(name) != shape}
    if missing or wrong:
        raise RuntimeError(
            f"the export in {directory} is not whole: missing {sorted(missing)}, (got, expected) {wrong}"
        )
