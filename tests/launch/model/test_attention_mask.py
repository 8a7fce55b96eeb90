"""Where a run leaves the attention mask out, the loss over labelled tokens is what it is with the mask."""

from types import SimpleNamespace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM, Trainer

from launch.model.attention_mask import padding_is_unseen
from launch.training.token_meter import TokenMeter
from launch.training.trainer import SftTrainer

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
UNSEEN = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", {}),
    "gemma2": ("gemma2", {"head_dim": 8}),
    "mixtral": ("mixtral", ROUTED | {"output_router_logits": False}),
    "mamba": ("mamba", {}),
}
SEEN = {
    "mixtral": ("mixtral", ROUTED | {"router_aux_loss_coef": 1.0}),
    "jetmoe": ("jetmoe", ROUTED | {"kv_channels": 8, "aux_loss_coef": 1.0}),
}


def model_of(name: str, more: dict):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**SMALL | more)).eval()


def losses(model) -> list[float]:
    """With the mask and without."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(1, 96, (3, 24), generator=generator)
    labels, mask = input_ids.clone(), torch.ones_like(input_ids)
    for row, length in enumerate((24, 13, 5)):
        input_ids[row, length:], labels[row, length:], mask[row, length:] = 0, -100, 0
    with torch.no_grad():
        return [
            model(input_ids=input_ids, labels=labels, **given).loss.item() for given in ({"attention_mask": mask}, {})
        ]


@pytest.mark.parametrize("name", UNSEEN)
def test_left_out_where_it_changes_nothing(name):
    model = model_of(*UNSEEN[name])
    assert padding_is_unseen(model)
    masked, bare = losses(model)
    assert bare == pytest.approx(masked, rel=1e-6)


@pytest.mark.parametrize("name", SEEN)
def test_kept_where_it_changes_the_loss(name):
    model = model_of(*SEEN[name])
    assert not padding_is_unseen(model)
    masked, bare = losses(model)
    assert bare != pytest.approx(masked, rel=1e-6)


def test_kept_for_code_that_nobody_knows():
    class Other(LlamaForCausalLM):
        pass

    assert not padding_is_unseen(Other(CONFIG_MAPPING["llama"](**SMALL)))


@pytest.mark.parametrize("unseen", [True, False])
def test_what_reaches_the_model(monkeypatch, unseen):
    reached = []
    for step in ("training_step", "prediction_step"):
        monkeypatch.setattr(Trainer, step, lambda _self, _model, inputs, *_: reached.append(dict(inputs)))
    trainer = object.__new__(SftTrainer)
    trainer._padding_is_unseen, trainer.train_meter = unseen, TokenMeter()
    trainer.accelerator, trainer.calibration = SimpleNamespace(sync_gradients=False), None
    for step in (trainer.training_step, trainer.prediction_step):
        step(None, {"attention_mask": torch.ones(1), "label_tokens": 7, "tokens": 9, "where": []})
    assert [inputs.keys() for inputs in reached] == [{"label_tokens"} | (set() if unseen else {"attention_mask"})] * 2
