"""The kinds of models that people have, a few thousand weights each, from a configuration."""

from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MOE = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": False}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
KINDS: dict[str, dict] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "cohere": {},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
    "falcon": {"multi_query": True, "new_decoder_architecture": False, "bias": True},
    "falcon-new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "gpt2": GPT | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_neox": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "gptj": GPT | {"rotary_dim": 8, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "granite": {},
    "llama": {},
    "mistral": {"sliding_window": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo": {},
    "olmo2": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0, "attention_dropout": 0.0},
    "phi": {"embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 48},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": MOE | {"head_dim": 16},
    "smollm3": {},
    "stablelm": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0},
}


def config_of(name: str, **values):
    """The small configuration of a kind; what follows a hyphen in `name` is a variant of it."""
    kind = name.partition("-")[0]
    config_class = CONFIG_MAPPING[kind]
    known = config_class().to_dict().keys() | config_class.attribute_map.keys()
    given = {key: value for key, value in (SMALL | KINDS.get(name, {}) | values).items() if key in known}
    return AutoConfig.for_model(kind, **given)


def write_kind(name: str, tokenizer: PreTrainedTokenizerBase, folder: Path, vocab: int, **values) -> Path:
    """Save a small model of a kind, and its tokenizer, to `folder/name`."""
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(name, vocab_size=vocab, **special, **values))
    with torch.no_grad():  # norms of ones and biases of zeros would hide what is done to them
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    path = folder / name
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
