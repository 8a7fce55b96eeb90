"""A model from a configuration: mistakes are sentences; and an export is held to what the configuration says."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launch.data.tokenization import train_tokenizer
from launch.errors import UserError
from launch.export import assert_complete
from launch.model import load_model, load_tokenizer
from launch.options import SftOptions
from smoothing import UnsupportedModel

SMALL = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a few words to learn pieces from", "and a few more of them"], 300)


def build(tokenizer, tp: int = 1, **values):
    options = SftOptions(model_config=SMALL | values, tp=tp)
    return load_model(options, tokenizer, torch.float32, seed=0)


def test_the_vocabulary_is_the_tokenizers_and_the_seed_decides(tokenizer):
    one, other = build(tokenizer), build(tokenizer)
    assert one.config.vocab_size == len(tokenizer)
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"hiden_size": 32}, "did you mean 'hidden_size'"),
        ({"hidden_size": "abc"}, "hidden_size"),
        ({"hidden_size": 30}, "--model_config"),
        ({"model_type": "lama"}, "lama"),
        ({"model_type": "vit", "hidden_size": 30}, "--model_config"),
        ({"vocab_size": 10}, "vocabulary of 10"),
        ({"model_type": None}, "model_type"),
    ],
)
def test_mistakes_in_a_configuration(tokenizer, values, word):
    with pytest.raises(UserError, match=word):
        build(tokenizer, **values)


def test_more_ranks_than_heads(tokenizer):
    with pytest.raises(UserError, match="more than the model's 4 attention heads"):
        build(tokenizer, tp=8)


def test_a_head_that_cannot_be_fused_is_refused_before_training(tokenizer):
    scaled = {"model_type": "granite", "logits_scaling": 8.0, "num_key_value_heads": 4}
    with pytest.raises(UnsupportedModel, match="logits_scaling"):
        build(tokenizer, **scaled)
    options = SftOptions(model_config=SMALL | scaled, head="sharded")
    assert load_model(options, tokenizer, torch.float32, seed=0).config.logits_scaling == 8.0


def test_a_model_that_is_not_there(tokenizer):
    options = SftOptions(model="./nowhere")
    with pytest.raises(UserError, match=r"\./nowhere"):
        load_model(options, tokenizer, torch.float32, seed=0)
    with pytest.raises(UserError, match=r"\./nowhere"):
        load_tokenizer(options, list)


@pytest.mark.parametrize("break_", ["missing", "shard", "extra", "none"])
def test_an_export_that_is_not_whole(break_):
    config = LlamaConfig(**{k: v for k, v in SMALL.items() if k != "model_type"}, vocab_size=31)
    weights = dict(LlamaForCausalLM(config).state_dict())
    if break_ == "missing":
        del weights["model.norm.weight"]
    if break_ == "shard":  # what save_16bit_model leaves under tensor parallelism
        weights["lm_head.weight"] = weights["lm_head.weight"][:16]
    if break_ == "extra":
        weights["other"] = torch.zeros(1)
    if break_ == "none":
        assert_complete(weights, LlamaForCausalLM, config)
    else:
        with pytest.raises(RuntimeError, match="not whole"):
            assert_complete(weights, LlamaForCausalLM, config)
