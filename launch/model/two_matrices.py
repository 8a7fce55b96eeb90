"""Checkpoints that hold two matrices where their configuration ties the output head to the embedding.

transformers loads both then, but under ZeRO 3, where it cannot see their values, it drops the head's.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from launch.common.library_patches import weightless
from launch.process.ranks import from_main

ROWS = 4096  # compared at a time


def untie(config: PreTrainedConfig, model: str, trust_remote_code: bool) -> str | None:
    """Make a configuration say what the weights of `model` are: not tied, if two that it ties have other values.

    Returns:
        What to say of it, or None if nothing was changed.

    Collectives:
        One broadcast of an object where the configuration ties: the first rank compares.
    """
    text = config.get_text_config()
    if not (getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False)):
        return None

    def differing() -> tuple[str, str] | None:
        with weightless():
            tied = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).all_tied_weights_keys
        files = _files(model)
        stored = (pair for pair in tied.items() if all(name in files for name in pair))
        return next((pair for pair in stored if not _equal(model, pair, files)), None)

    if (pair := from_main(differing)) is None:
        return None
    config.tie_word_embeddings = text.tie_word_embeddings = False
    return (
        f"{model} holds two matrices, {pair[0]} and {pair[1]}, though its config.json says tie_word_embeddings: both "
        "are trained, and the export says that they are not tied"
    )


def _equal(model: str, pair: tuple[str, str], files: Mapping[str, str]) -> bool:
    with ExitStack() as stack:
        one, other = (
            stack.enter_context(safe_open(_file(model, files[name]), "pt")).get_slice(name) for name in pair
        )
        if one.get_shape() != other.get_shape():
            return False
        starts = range(0, one.get_shape()[0], ROWS)
        return all(torch.equal(one[start : start + ROWS], other[start : start + ROWS]) for start in starts)


def _files(model: str) -> dict[str, str]:
    """Return the name of the file of each weight of a checkpoint; empty if there are no safetensors."""
    if index := _file(model, SAFE_WEIGHTS_INDEX_NAME):
        return json.loads(Path(index).read_text())["weight_map"]
    if (file := _file(model, SAFE_WEIGHTS_NAME)) is None:
        return {}
    with safe_open(file, "pt") as weights:
        return dict.fromkeys(weights.keys(), SAFE_WEIGHTS_NAME)


def _file(model: str, name: str) -> str | None:
    return cached_file(model, name, _raise_exceptions_for_missing_entries=False)
