"""The split of `--sanity --tp N`: it fails on a lost gradient, and large models have small copies of their kind."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from launch.common.library_patches import weightless
from launch.config.options import SftOptions
from launch.model.smoothing_prior import loss_settings
from launch.preflight import model_split
from launch.preflight.model_split import MOST_PARAMETERS, check_model_split
from launch.preflight.small_copy import small_copy
from tests.support.kinds import KINDS, config_of

SETTINGS = loss_settings(SftOptions(smoothing=0.1), None)
SPECIAL = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
LARGE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30, "moe_intermediate_size": 1024}
LARGE |= {"num_attention_heads": 32, "num_key_value_heads": 8, "num_experts": 64}
# Qwen3-MoE's attention as many write it down: without the norms, whose gradients are then one rank's share
FORGETFUL = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*\.self_attn\.[qkv]_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.self_attn\.o_proj\.weight$"], "partition_type": "row"},
    ],
}


def model_of(kind: str, **values):
    return AutoModelForCausalLM.from_config(config_of(kind, vocab_size=61, **SPECIAL, **values))


@pytest.mark.timeout(400)
def test_a_lost_gradient_fails_though_the_loss_is_right(monkeypatch):
    monkeypatch.setattr(model_split, "MOST_PARAMETERS", 0)
    section = {"autotp_size": 2, "vocab_parallel_lm_head": True, "partition_config": FORGETFUL}
    check = check_model_split(model_of("qwen3_moe"), SftOptions(tp=2), section, SETTINGS)
    assert check.passed is False, check
    assert "a small copy of the architecture" in check.figure and "_norm.weight" in check.figure
    assert float(check.figure.split("loss ")[1].split(",")[0]) < 1e-6


@pytest.mark.timeout(400)
def test_adapters_are_split_with_their_layers():
    """Fused, gathered and summed layers; without dropout, which the run has."""
    section = {"autotp_size": 2, "vocab_parallel_lm_head": True}
    options = SftOptions(tp=2, model="base", lora_rank=4, lora_dropout=0.3, dora=True)
    check = check_model_split(model_of("phi3"), options, section, SETTINGS)
    assert check.passed, check
    assert "the model itself" in check.figure and ".lora_" in check.figure


@pytest.mark.parametrize("kind", KINDS)
def test_small_copies(kind):
    heads = {"num_key_value_heads": 32} if kind == "deepseek_v3" else {}  # its keys are of all heads
    given = {name: value for name, value in LARGE.items() if name not in KINDS[kind]}
    large = config_of(kind, vocab_size=61, **SPECIAL, **(given | heads))
    with weightless():
        assert AutoModelForCausalLM.from_config(large).num_parameters() > MOST_PARAMETERS or "n_head" in KINDS[kind]
    before = large.to_dict()
    small = small_copy(large, 2)
    assert large.to_dict() == before and type(small) is type(large)
    model = AutoModelForCausalLM.from_config(small)
    assert model.num_parameters() < 2_000_000
    text, own = small.get_text_config(), large.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        assert getattr(text, name, None) == getattr(own, name, None)
    with torch.no_grad():
        assert model(input_ids=torch.arange(12).unsqueeze(0)).logits.isfinite().all()


def test_what_cannot_be_tried_is_said(monkeypatch):
    class Own(type(model_of("llama"))):
        pass

    check = check_model_split(Own(config_of("llama", vocab_size=61, **SPECIAL)), SftOptions(tp=2), {}, SETTINGS)
    assert check.passed is None and check.figure == "not tried: the model has code of its own"
    monkeypatch.setattr(model_split, "MOST_PARAMETERS", 0)
    options = SftOptions(tp=2, model="base", lora_rank=4, lora_targets=["layers.2.mlp.up_proj"])
    check = check_model_split(model_of("llama", num_hidden_layers=3), options, {}, SETTINGS)
    assert check.passed is None and "has other layers: --lora_targets: no layer is named" in check.figure
