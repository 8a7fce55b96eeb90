"""What a Hugging Face model does to its logits and its loss, by its configuration, besides what a loss can see."""

from typing import Any

# The names under which models keep what they multiply or divide their logits by, after the head; 1 is no change.
SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling",)  # what logits are divided by (Granite), but for these types of models
MULTIPLIERS = ("hyperclovax",)
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


def own_scale(model: Any) -> float:
    """What this model multiplies its logits by itself, between head and loss; 1 for nothing."""
    config = text_config(model)
    for name in SCALES:
        value = getattr(config, name, None)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue  # MPT's logit_scale may be the name of a rule
        divides = name in DIVISORS and getattr(config, "model_type", None) not in MULTIPLIERS
        return 1 / value if divides and value else float(value)
    return 1.0


def own_softcap(model: Any) -> float | None:
    """What this model caps its logits with itself, between head and loss."""
    softcap: float | None = _setting(model, SOFTCAPS)
    return softcap


def _setting(model: Any, names: tuple[str, ...]) -> Any:
    config = text_config(model)
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def text_config(model: Any) -> Any:
    """The configuration of the language model, which may be part of a larger one."""
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
