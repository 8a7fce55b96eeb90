"""What is exported of a model with adapters: the adapters alone, or a whole model that they are merged into."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import GenerationConfig


def check_adapter(model: PeftModel, weights: Mapping[str, Tensor]) -> None:
    """Raise `RuntimeError` unless these are all weights that are trained, in their shapes."""
    wanted = {name: tuple(p.shape) for name, p in twin(model).named_parameters() if p.requires_grad}
    got = {name: tuple(weight.shape) for name, weight in weights.items()}
    if wrong := {name: (got.get(name), wanted.get(name)) for name, _ in wanted.items() ^ got.items()}:
        raise RuntimeError(f"the adapter to export is not complete: (got, expected) {wrong}")


def save_adapter(model: PeftModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write peft's files, and the generation configuration: the stops that were learned, and `label_smoothing`.

    A config.json would keep transformers from taking the folder for an adapter.
    """
    model.save_pretrained(folder, state_dict=dict(weights), save_embedding_layers=False)
    base = model.get_base_model()
    generation = copy.deepcopy(base.generation_config or GenerationConfig())
    generation.label_smoothing = base.config.label_smoothing
    generation._from_model_config = False  # else transformers reads no key of ours
    generation.save_pretrained(folder)


def merged(model: PeftModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the model without adapters that computes the same, by the names that it has."""
    whole = twin(model)
    whole.load_state_dict(weights, strict=False, assign=True)
    whole.get_base_model().tie_weights()  # else peft would take the one for another
    return whole.merge_and_unload(safe_merge=True).state_dict()


def twin(model: PeftModel) -> PeftModel:
    """Return the same model built anew on the meta device, outside what ZeRO 3 partitions."""
    base, config = model.get_base_model(), copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path = None  # else peft warns that it puts another there
    with torch.device("meta"):
        # the class itself: under ZeRO 3 `from_config` would partition the model, with collectives, on this rank alone
        return get_peft_model(type(base)(copy.deepcopy(base.config)), config, autocast_adapter_dtype=False)
