"""Whether padding on the right changes what is learned. Where it does not, a model needs no attention mask.

Without a mask attention uses its faster, causal kernels. In a causal model no token sees what follows it.
"""

from transformers import PreTrainedModel

LOOKS_EVERYWHERE = {"reformer"}  # all tokens of a row go into its hashing


def padding_is_unseen(model: PreTrainedModel) -> bool:
    """Return whether it is sure that padding changes nothing; only of transformers' own models is that known.

    Losses of routers count every token, padding too.
    """
    configs = (model.config, model.config.get_text_config())
    routed = any(getattr(config, "output_router_logits", False) for config in configs)
    known = type(model).__module__.startswith("transformers.")
    return known and not routed and LOOKS_EVERYWHERE.isdisjoint(config.model_type for config in configs)
