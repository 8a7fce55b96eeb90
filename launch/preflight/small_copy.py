"""A small model of the same architecture: two layers and narrow ones, with the heads of the large one."""

import copy

from transformers import PreTrainedConfig

HEAD = 8  # the width of an attention head
WIDTHS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "ffn_dim",
    "ffn_hidden_size",
    "n_inner",
)
HEAD_WIDTHS = (
    "head_dim",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "query_pre_attn_scalar",
)
RANKS = ("q_lora_rank", "kv_lora_rank")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
LAYERS = 2


def small_copy(config: PreTrainedConfig, tp: int) -> PreTrainedConfig:
    """Return a configuration of the same kind with few weights. Not every kind can be built from it."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    hidden = HEAD * text.num_attention_heads
    values = {
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "num_hidden_layers": LAYERS,
        "rotary_dim": HEAD // 2,
    }
    values |= dict.fromkeys(WIDTHS, 16 * tp) | dict.fromkeys(HEAD_WIDTHS, HEAD) | dict.fromkeys(RANKS, 2 * HEAD)
    values |= dict.fromkeys(EXPERTS, 4) | {
        "qk_head_dim": 2 * HEAD,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    }
    for name, value in values.items():
        computed = isinstance(getattr(type(text), name, None), property)
        if getattr(text, name, None) is not None and not computed:
            setattr(text, name, value)
    if getattr(text, "layer_types", None):
        text.layer_types = [text.layer_types[0], text.layer_types[-1]]
    if getattr(text, "first_k_dense_replace", None):
        text.first_k_dense_replace = 1
    return small
