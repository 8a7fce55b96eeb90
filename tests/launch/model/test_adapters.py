"""Which layers can be adapted, how adapters are drawn, and what a frozen head costs."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from launch.common.errors import UserError
from launch.config.deepspeed import deepspeed_config
from launch.config.options import SftOptions, check_options
from launch.model import four_bit
from launch.model.adapters import targets_problem, with_adapter
from launch.model.base_digest import base_digest
from launch.model.four_bit import check_four_bit
from launch.model.load import load_model
from smoothing import install_smoothed_loss

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 501,
}


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype)


def options(**given) -> SftOptions:
    return SftOptions(**{"model": "somewhere", "lora_rank": 4} | given)


REFUSED = [
    ({"lora_rank": -1}, "--lora_rank must be at least 0, got -1"),
    ({"lora_rank": 0, "dora": True}, "--dora goes with --lora_rank, which is not given"),
    ({"lora_rank": 0, "lora_targets": ["q_proj"]}, "--lora_targets goes with --lora_rank"),
    ({"lora_alpha": 0}, "--lora_alpha must be at least 1, got 0"),
    ({"lora_dropout": 1.0}, r"--lora_dropout must lie in \[0, 1\), got 1.0"),
    ({"model": None, "model_config": {"model_type": "llama"}}, "has random weights; give --model"),
    ({"load_in_4bit": True, "lora_rank": 0}, "--load_in_4bit goes with --lora_rank"),
    ({"load_in_4bit": True, "merge_adapter": True}, "merge the adapter into the model of --model with peft"),
]


@pytest.mark.parametrize(("given", "words"), REFUSED)
def test_flags_that_contradict_each_other(given, words):
    with pytest.raises(UserError, match=words):
        check_options(SftOptions(**{"model": "somewhere", "lora_rank": 4} | given))
    check_options(options())
    check_options(options(lora_rank=0, lora_dropout=0.0))


def test_a_split_of_ones_own_says_nothing_of_adapters(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"tensor_parallel": {"autotp_size": 2, "preset_model": "llama"}}))
    with pytest.raises(UserError, match="tensor parallelism 2 and preset_model in the DeepSpeed file"):
        deepspeed_config(options(), str(file), 2)
    assert deepspeed_config(options(tp=2, dora=True, lora_dropout=0.1), None, 2)[0].tp == 2


@pytest.mark.parametrize(
    ("given", "stage", "words"),
    [
        ({"tp": 2}, 1, "cannot be used with --tp 2"),
        ({}, 3, "cannot be used with --zero 3"),
        ({}, 2, "needs bitsandbytes, which is not installed: pip install bitsandbytes"),
    ],
)
def test_where_a_model_cannot_be_kept_in_4_bits(given, stage, words, monkeypatch):
    monkeypatch.setattr(four_bit, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=words):
        check_four_bit(options(load_in_4bit=True, **given), stage)
    check_four_bit(options(), stage)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_prj"], "no layer is named 'q_prj'; did you mean 'q_proj'?"),
        (["q_proj", "c_attn"], "no layer is named 'c_attn'; those of LlamaForCausalLM are down_proj, gate_proj, "),
        (["proj"], "no layer is named 'proj'"),
        (["lm_head"], "lm_head is the output head, which computes the loss"),
        (["embed_tokens"], "embed_tokens is a Embedding, no linear layer"),
        (["self_attn"], "self_attn is a LlamaAttention, no linear layer"),
    ],
)
def test_targets_that_cannot_be_adapted(targets, words):
    assert words in targets_problem(llama(), targets)


@pytest.mark.parametrize(
    ("targets", "layers"),
    [(None, 14), (["all-linear"], 14), (["q_proj", "v_proj"], 4), (["layers.1.mlp.up_proj"], 1)],
)
def test_what_is_trained(targets, layers, capsys):
    model = with_adapter(llama(), options(lora_targets=targets), 0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * layers and all("lora_" in name for name in trained)
    assert f"LoRA of rank 4 in {layers} layer" in capsys.readouterr().out
    assert model.peft_config["default"].lora_alpha == 8


def test_every_linear_layer_of_a_model_without_linear_layers():
    """GPT-2's are Conv1D, whose weights are transposed."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=501)).eval()
    before = model(torch.arange(7)[None]).logits
    adapted = with_adapter(model, options(), 0).eval()
    assert sum(p.requires_grad for p in adapted.parameters()) == 2 * 4
    torch.testing.assert_close(adapted(torch.arange(7)[None]).logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_drawn_from_the_seed_in_the_models_precision(dtype):
    def drawn(seed: int) -> list[torch.Tensor]:
        torch.rand(3)  # whatever was drawn before
        parameters = list(with_adapter(llama(dtype), options(), seed).parameters())
        return [p.detach() for p in parameters if p.requires_grad]

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert {p.dtype for p in first} == {dtype}
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize(("rank", "products"), [(4, 2), (0, 3)])
def test_a_frozen_head_costs_two_products(rank, products):
    model, ids = with_adapter(llama(), options(lora_rank=rank), 0), torch.arange(40)[None] % 7
    with install_smoothed_loss(model, head="fused"), FlopCounterMode(display=False) as counted:
        model(input_ids=ids, labels=ids).loss.backward()
    size, tokens, vocab = SIZES["hidden_size"], ids.numel() - 1, SIZES["vocab_size"]
    of_head = 2 * tokens * size * vocab
    total = counted.get_total_flops()
    with install_smoothed_loss(model, head="fused"), FlopCounterMode(display=False) as counted:
        model(input_ids=ids, labels=torch.full_like(ids, -100)).loss.backward()  # all but the head's
    assert (total - counted.get_total_flops()) / of_head == pytest.approx(products, abs=0.2)


@pytest.mark.parametrize(("model", "address"), [("here/base", "{}/here/base"), ("some/where", "some/where")])
def test_an_adapter_names_its_base_for_any_directory(model, address, tmp_path, monkeypatch):
    (tmp_path / "here" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    adapted = with_adapter(llama(), options(model=model), 0)
    assert adapted.peft_config["default"].base_model_name_or_path == address.format(tmp_path)


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter, not a model; merge it into its base first"):
        load_model(options(model=str(tmp_path)), None, torch.float32, 0)


def test_a_digest_is_of_configuration_and_weights_alone(tmp_path):
    """Not of how the weights are divided into files, nor of the version that saved them."""
    model, folder = llama(), tmp_path / "base"
    model.save_pretrained(folder)
    digest = base_digest(str(folder))
    model.save_pretrained(tmp_path / "files", max_shard_size="20KB")
    assert len(list((tmp_path / "files").glob("*.safetensors"))) > 3
    cache = Path(os.environ["HF_HOME"], "hub", "models--some--base")
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    shutil.copytree(tmp_path / "files", cache / "snapshots" / ("a" * 40))
    assert base_digest(str(tmp_path / "files")) == base_digest("some/base") == digest
    config = json.loads((folder / "config.json").read_text())
    for more, same in (({"transformers_version": "4.0"}, True), ({"rms_norm_eps": 1e-3}, False)):
        (folder / "config.json").write_text(json.dumps(config | more))
        assert (base_digest(str(folder)) == digest) == same
    for place in (0, -1):  # of any weight, first and last
        for name, parameter in model.named_parameters():
            if "layers.0" not in name:
                values = parameter.data.view(-1)
                before = values[place].item()
                values[place] += 1
                model.save_pretrained(tmp_path / "other")
                assert base_digest(str(tmp_path / "other")) != digest, name
                values[place] = before
    model.save_pretrained(tmp_path / "other")
    assert base_digest(str(tmp_path / "other")) == digest
