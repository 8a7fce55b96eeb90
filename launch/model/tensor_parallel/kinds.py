"""The kinds of models whose split is shown to train as one process does, and what their plans lack.

A kind is a configuration's `model_type`. `tests/runs/test_tensor_parallel.py` trains each on two ranks and on one
process; `docs/tensor-parallelism.md` has the table. Of every other model only the head is split.
"""

SHOWN = (
    "cohere",
    "deepseek_v3",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt_neox",
    "gptj",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
)

_ATTENTION = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise"}
_SHARED_EXPERT = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}


def _under(folder: str, plan: dict[str, str]) -> dict[str, str]:
    return {f"{folder}.{name}": style for name, style in plan.items()}


# In transformers' words, added to the plan of the configuration.
ADDED_PLANS = {
    "falcon": _under("h.*.mlp", {"dense_h_to_4h": "colwise_gather_output", "dense_4h_to_h": "rowwise_split_input"}),
    "opt": {
        **_under("decoder.layers.*.self_attn", _ATTENTION | {"out_proj": "rowwise"}),
        **_under("decoder.layers.*", {"fc1": "colwise_gather_output", "fc2": "rowwise_split_input"}),
    },
    "qwen2_moe": _under("layers.*.mlp.shared_expert", _SHARED_EXPERT),
    "stablelm": {
        **_under("layers.*.self_attn", _ATTENTION | {"o_proj": "rowwise"}),
        **_under("layers.*.mlp", {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}),
    },
}
