"""What a Hugging Face model does to its logits and its loss, by its configuration, besides what a loss can see."""

from typing import Any

from torch import nn

# The names under which models keep what they multiply or divide their logits by, after the head; 1 is no change.
SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
# ... and what they cap them with, as cap·tanh(z / cap).
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# The losses, by `model.loss_type`, whose logits predict the next label; None is the default, which does too.
CAUSAL_LOSSES = (None, "ForCausalLM", "ForConditionalGeneration")


class UnsupportedModel(ValueError):
    """The loss, or the `head` that was passed, cannot be installed in this model."""


def smoothing_problem(model: Any) -> str | None:
    """Return why no loss can stand in for this model's own, or None."""
    if (loss_type := getattr(model, "loss_type", None)) not in CAUSAL_LOSSES:
        return f"expected a causal LM, whose logits predict the next label, got a model with the loss {loss_type}"
    if (coefficient := _setting(model, ("z_loss_coefficient",))) not in (None, 0):
        return (
            f"this model adds a z-loss of its own logits (z_loss_coefficient={coefficient}) to any loss; set it to 0 "
            "and use z_loss="
        )
    return None


def fusing_problem(model: Any) -> str | None:
    """Return why the output head of this model cannot compute its loss, or None."""
    lm_head = model.get_output_embeddings()
    if not (is_sharded(lm_head) or type(lm_head) is nn.Linear):
        return (
            f"head='fused' needs a plain nn.Linear or DeepSpeed's VocabParallelLinear as output head, got "
            f"{type(lm_head).__name__}; use head='sharded'"
        )
    for name in SCALES:
        if (scale := _setting(model, (name,))) not in (None, 1):
            return (
                f"this model scales its logits ({name}={scale}) after the head, which head='fused' does not; use "
                "head='sharded'"
            )
    return None


def own_softcap(model: Any) -> float | None:
    """What this model caps its logits with itself, between head and loss."""
    softcap: float | None = _setting(model, SOFTCAPS)
    return softcap


def is_sharded(lm_head: nn.Module) -> bool:
    """Whether this output head is DeepSpeed's, which gives a rank's own logits."""
    return getattr(lm_head, "is_vocab_parallel_lm_head", False)


def _setting(model: Any, names: tuple[str, ...]) -> Any:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
