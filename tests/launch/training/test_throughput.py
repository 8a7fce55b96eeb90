"""MFU: operations counted from the weights, held against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from launch.training import throughput
from launch.training.throughput import Operations

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def counted(model, tokens: int) -> int:
    """Operations of the products of two matrices: attention's are batched, or in one operation."""
    with FlopCounterMode(display=False) as counter:
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        model(input_ids=ids, labels=ids).loss.backward()
    by_operation = counter.get_flop_counts()["Global"]
    return sum(by_operation.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
def test_operations_are_those_of_the_products(tied, frozen):
    model = AutoModelForCausalLM.from_config(LlamaConfig(tie_word_embeddings=tied, **SIZES))
    if frozen:
        for name, weight in model.named_parameters():
            weight.requires_grad_("layers.0.mlp.down_proj" in name or "norm" in name)
    operations = Operations.of(model, fused=True)
    expected = counted(model, 16) / 16
    if frozen:  # below the first trained weight there is no gradient of hidden states either
        assert operations.per_token + operations.per_label_token >= expected
        weights = sum(weight.numel() for weight in model.parameters() if weight.dim() > 1)
        weights -= 0 if tied else 96 * 32
        assert operations.per_token + operations.per_label_token == 4 * weights + 2 * 32 * 64
        return
    assert operations.per_label_token == 6 * 96 * 32
    assert operations.per_token + operations.per_label_token == expected
    whole = Operations.of(model, fused=False)
    assert (whole.per_token, whole.per_label_token) == (expected, 0)


def test_of_experts_those_that_a_token_goes_to():
    model = AutoModelForCausalLM.from_config(
        Qwen3MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, **SIZES)
    )
    expert, attention, router = 3 * 32 * 16, 2 * 32 * 32 + 2 * 32 * 16, 8 * 32
    assert Operations.of(model, fused=True).per_token == 6 * 2 * (2 * expert + attention + router)


@pytest.mark.parametrize(
    ("name", "mfu"), [("NVIDIA H100 80GB HBM3", 0.5), ("NVIDIA H100 PCIe", 0.5 * 989 / 756), ("unknown", None)]
)
def test_utilisation_is_of_all_ranks(monkeypatch, name, mfu):
    monkeypatch.setattr(throughput, "uses_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    operations = Operations(per_token=989e12 / 100, per_label_token=989e12 / 50)
    assert operations.utilisation(tokens=200, label_tokens=50, seconds=2.0, ranks=3) == (
        None if mfu is None else pytest.approx(mfu)
    )


def test_a_cpu_has_no_rate():
    assert Operations(1.0, 1.0).utilisation(10, 10, 1.0, 1) is None
