"""Training on one batch, as `--sanity` does it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from launch.config.options import SftOptions
from launch.model.smoothing_prior import loss_settings
from launch.preflight import model_checks


def test_of_a_large_model_the_last_layers_are_trained_and_the_others_stay_as_they_were(monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 40}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    monkeypatch.setattr(model_checks, "OVERFIT_PARAMETERS", model.num_parameters() // 2)
    ids = torch.arange(20)[None]
    options = SftOptions()
    settings = loss_settings(options, None)
    assert model_checks.check_overfit(model, {"input_ids": ids, "labels": ids}, options, settings).passed is not None
    assert all(parameter.requires_grad for parameter in model.parameters()), "the estimate of memory counts these"
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert "lm_head.weight" in changed and "model.layers.0.mlp.up_proj.weight" not in changed
