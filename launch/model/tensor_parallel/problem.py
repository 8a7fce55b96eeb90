"""What a model cannot be split for, known from its configuration, before any weights are loaded."""

from torch import nn
from transformers import PreTrainedModel

from launch.model.tensor_parallel.prepare import scaled

HEAD_NAMES = (
    "lm_head",
    "embed_out",
)  # that DeepSpeed 0.19.8 splits without gathering (AutoTPConfig.lm_head_patterns)
ALONE = "train it with --tp 1"


def split_problem(model: PreTrainedModel, tp: int) -> str | None:
    """Return why the model, which may be on the meta device, cannot be split over `tp` ranks, or None."""
    config, name = model.config.get_text_config(), type(model).__name__
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, int) and tp > heads:
        return f"--tp {tp} is more than the model's {heads} attention heads; use at most {heads}"
    if tp > config.vocab_size:
        return f"--tp {tp} is more than the model's vocabulary of {config.vocab_size}; use at most that"
    found = {path: module for path, module in model.named_modules() if path.split(".")[-1] in HEAD_NAMES}
    linear = {path: module for path, module in found.items() if isinstance(module, nn.Linear)}
    if not linear:
        return (
            f"--tp {tp}: the output head of {name} is no linear layer named {' or '.join(HEAD_NAMES)}, and DeepSpeed "
            f"splits no other; {ALONE}"
        )
    if len(linear) > 1:
        return f"--tp {tp}: {name} has several output heads, {' and '.join(linear)}, and one can be split; {ALONE}"
    (head,) = linear.values()
    for module in model.modules():
        tied = isinstance(module, nn.Embedding) and module.weight is head.weight
        if tied and not _splittable(module):
            return (
                f"--tp {tp}: {name} ties its output head to a {type(module).__name__}, an embedding that does more "
                f"than look up its rows, which DeepSpeed cannot split; {ALONE}"
            )
    return None


def _splittable(embedding: nn.Embedding) -> bool:
    """Return whether DeepSpeed 0.19.8 splits this embedding with the head (`validate_embedding`)."""
    name = type(embedding).__name__
    plain = type(embedding).forward is nn.Embedding.forward or name == "Gemma3TextScaledWordEmbedding"
    options = embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse
    return (plain or scaled(embedding)) and not options
