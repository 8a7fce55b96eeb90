"""What is split of a model, and what is refused; `tests/runs/test_tensor_parallel.py` trains with it."""

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from launch.common.errors import UserError
from launch.common.library_patches import weightless
from launch.config.options import SftOptions
from launch.data.train_tokenizer import train_tokenizer
from launch.model.adapters import with_adapter
from launch.model.load import load_model
from launch.model.tensor_parallel.adapters import with_factors
from launch.model.tensor_parallel.apply import split_model
from launch.model.tensor_parallel.dropout import check_dropout
from launch.model.tensor_parallel.held_whole import held_whole
from launch.model.tensor_parallel.kinds import ADDED_PLANS, SHOWN
from launch.model.tensor_parallel.problem import split_problem
from launch.model.tensor_parallel.split import Split, plan_split
from tests.support.kinds import KINDS, config_of, write_kind

SPECIAL = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)


def meta(kind: str, **values):
    with weightless():
        return AutoModelForCausalLM.from_config(config_of(kind, vocab_size=64, **SPECIAL, **values))


def matched(split: Split, name: str) -> list[dict]:
    return [spec for spec in split.specs if any(re.match(pattern, name) for pattern in spec["patterns"])]


def test_every_kind_that_is_split_is_tested():
    assert {name.partition("-")[0] for name in KINDS} >= {*SHOWN, *ADDED_PLANS}


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_has_one_spec(kind):
    model = meta(kind)
    split = plan_split(model)
    inner = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = {name: matched(split, f"{name}.weight") for name in inner}
    assert all(len(specs) <= 1 for specs in found.values())
    assert any(found.values()) == (kind not in ("bloom", "gpt2"))
    assert not found[next(name for name in inner if name.endswith(("lm_head", "embed_out")))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_is_cut_as_its_layer_is(kind):
    """B by the output of a column-parallel layer, A by the input of a row-parallel one; a whole layer's are whole."""
    model = meta(kind)
    split = plan_split(model)
    adapted = with_adapter(model, SftOptions(model="base", lora_rank=4), 0, quiet=True)
    factors = replace(split, specs=with_factors(split.specs))
    cut = {"column": ["base_layer", "lora_B.default"], "row": ["base_layer", "lora_A.default"]}
    for name in adapted.targeted_module_names:
        before = matched(split, f"{name}.weight")
        found = {
            part: matched(factors, f"base_model.model.{name}.{part}.weight")
            for part in ("base_layer", "lora_A.default", "lora_B.default")
        }
        assert [part for part, specs in found.items() if specs] == (
            cut[before[0]["partition_type"]] if before else []
        )
    assert not any(spec.get("grad_allreduce") for spec in factors.specs), "a frozen norm takes no hook"


def test_what_every_rank_holds():
    """Row-parallel layers' biases too, and one factor of each adapter, but no part of the head."""
    model = meta("phi")
    split = plan_split(model)
    adapted = with_adapter(model, SftOptions(model="base", lora_rank=4, lora_targets=["q_proj", "dense"]), 0, True)
    whole = {id(parameter) for parameter in held_whole(adapted, split)}
    names = {
        name.removeprefix("base_model.model.model.").replace("layers.0", "layer")
        for name, parameter in adapted.named_parameters()
        if id(parameter) in whole and "layers.1" not in name
    }
    norms = {f"{name}.{part}" for name in ("layer.input_layernorm", "final_layernorm") for part in ("weight", "bias")}
    assert names == norms | {
        "embed_tokens.weight",
        "layer.self_attn.q_proj.lora_A.default.weight",
        "layer.self_attn.dense.base_layer.bias",
        "layer.self_attn.dense.lora_B.default.weight",
        "layer.mlp.fc2.bias",
    }


@pytest.mark.parametrize(
    ("kind", "values"),
    [("phi", {"qk_layernorm": True}), ("stablelm", {"qk_layernorm": True}), ("cohere", {"use_qk_norm": True})],
)
def test_a_norm_that_the_plan_forgets_keeps_the_attention_whole(kind, values):
    """It would be applied to a rank's heads, with a gradient that is that rank's alone."""
    assert "model.layers.*.self_attn" in plan_split(meta(kind)).parallel
    split = plan_split(meta(kind, **values))
    assert split.parallel == ("model.layers.*.mlp",) and not split.gathered
    assert not matched(split, "model.layers.0.self_attn.q_proj.weight")


def test_gradients_of_norms_over_heads_are_summed():
    (spec,) = matched(plan_split(meta("qwen3_moe")), "model.layers.1.self_attn.q_norm.weight")
    assert spec["partition_type"] == "skip" and spec["grad_allreduce"]


def test_names_under_a_wrapper_match_and_longer_ones_do_not():
    split = plan_split(meta("llama"))
    assert len(matched(split, "base_model.model.model.layers.11.mlp.up_proj.weight")) == 1
    for name in (
        "model.layers.1.mlp.up_proj.bias",
        "model.layers.1.mlp.experts.up_proj.weight",
        "xmodel.layers.1.mlp.up_proj.weight",
    ):
        assert not matched(split, name)


class Own(LlamaForCausalLM):
    """A class that is not transformers' own: its forward may be anything."""


@pytest.mark.parametrize("kind", ["ernie4_5", "own"])
def test_of_an_unknown_model_the_head_is_split_alone(kind):
    if kind == "own":
        with weightless():
            model = Own(config_of("llama", vocab_size=64, **SPECIAL))
    else:
        model = meta(kind)
    section: dict = {"autotp_size": 2}
    assert split_model(model, section) == Split()
    assert section["partition_config"]["layer_specs"] == [{"patterns": ["^nothing$"], "partition_type": "skip"}]
    assert not split_problem(model, 2)


@pytest.mark.parametrize("section", [{"partition_config": {"layer_specs": []}}, {"preset_model": "llama"}])
def test_a_users_own_split_is_left_as_it_is(section):
    given = dict(section)
    model = meta("llama")
    assert split_model(model, section) is None and section == given
    assert not hasattr(model.model, "replaced")


HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48}


@pytest.mark.parametrize(
    ("kind", "values", "what"),
    [
        ("llama", {}, None),
        (
            "llama",
            {"attention_dropout": 0.1},
            "dropout in model.layers.*.self_attn: each rank draws for its own part",
        ),
        ("gptj", {"attn_pdrop": 0.1}, "dropout in transformer.h.*.attn: each rank"),
        ("gptj", {"resid_pdrop": 0.1}, None),  # of what all ranks have whole
        ("starcoder2", {"residual_dropout": 0.1}, None),
        ("bloom", {"attention_dropout": 0.1}, None),  # its attention is whole
        ("llama", HEADS, None),
        ("llama", HEADS | {"attention_dropout": 0.1}, "num_key_value_heads 3 cannot be divided by 2"),
    ],
)
def test_dropout_of_what_ranks_share(kind, values, what, capsys):
    model = meta(kind, **values)
    if what is None or "divided" not in what:
        check_dropout(model, plan_split(model), 2)
        assert (what or "") in (said := capsys.readouterr().out) and bool(said) == bool(what)
    else:
        with pytest.raises(UserError, match=what):
            check_dropout(model, plan_split(model), 2)


def _two_heads(model):
    model.model.lm_head = nn.Linear(64, 64)


def _other_head(model):
    model.lm_head = nn.Sequential(nn.Linear(64, 64))


def _own_embedding(model):
    class Doubled(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    model.model.embed_tokens.__class__ = Doubled
    model.lm_head.weight = model.model.embed_tokens.weight


def _bounded_embedding(model):
    model.model.embed_tokens.max_norm = 1.0
    model.lm_head.weight = model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "tp", "words"),
    [
        (lambda _: None, 5, "--tp 5 is more than the model's 4 attention heads; use at most 4"),
        (_two_heads, 2, "has several output heads, model.lm_head and lm_head"),
        (_other_head, 2, "is no linear layer named lm_head or embed_out"),
        (_own_embedding, 2, "ties its output head to a Doubled, an embedding that does more"),
        (_bounded_embedding, 2, "ties its output head to a Embedding"),
    ],
)
def test_what_cannot_be_split_is_a_sentence(change, tp, words):
    model = meta("llama")
    assert split_problem(model, 2) is None
    change(model)
    assert words in split_problem(model, tp)


def test_it_is_refused_before_the_weights_are_loaded(tmp_path):
    tokenizer = train_tokenizer(["a few words to learn pieces from"], 290)
    path = write_kind("llama", tokenizer, tmp_path, len(tokenizer))
    (path / "model.safetensors").write_bytes(b"no weights")
    for tp, words in ((5, "4 attention heads"), (2, "could not be loaded")):
        with pytest.raises(UserError, match=words):
            load_model(SftOptions(model=str(path), tp=tp, max_length=64), tokenizer, torch.float32, seed=0)
