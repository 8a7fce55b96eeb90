"""Put a smoothed loss into a Hugging Face causal LM, or a DeepSpeed engine around one."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from smoothing.core.options import DEFAULT_IGNORE_INDEX, LossOptions
from smoothing.linear.chunks import chunk_bytes_problem
from smoothing.model.head_weight import acting_head, linear_problem
from smoothing.model.installed_loss import Installation, InstalledLoss, OnStats
from smoothing.model.support import UnsupportedModel, own_scale, own_softcap, smoothing_problem

HEADS = ("fused", "sharded", "dense")
WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module")


def install_smoothed_loss(
    model: nn.Module,
    *,
    label_smoothing: float = 0.1,
    head: str = "fused",
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    smoothing_prior: Tensor | None = None,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    logit_scale: float | None = None,
    on_stats: OnStats | None = None,
    chunk_bytes: int | None = None,
    logits_in_eval: bool = True,
) -> InstalledLoss:
    """Replace `model.loss_function` by the smoothed loss; call it after `deepspeed.initialize`, or on a plain model.

    Smoothing (with its prior and z-loss) is how a model is trained: in evaluation mode the loss is the plain nll. A
    forward without labels, as in `generate`, always gives whole logits. A forward may be passed `label_tokens=`, the
    number of positions that have a label to predict: then the host need not wait until a device has counted them.

    Args:
        model: a Hugging Face causal LM, or a DeepSpeed engine or PEFT model around one.
        label_smoothing: ε, in [0, 1].
        head: "fused": the output head computes the loss, with the model's own softcap; no logits are made, and
            `outputs.logits` is None. "sharded": the loss takes each rank's own logits, which are not gathered.
            "dense": they are, and `F.cross_entropy` takes them: the baseline to compare with.
        ignore_index: label of positions that have none.
        smoothing_prior: `[V]` floating point, a distribution over the vocabulary, of which each rank takes its part;
            or `[S]`, this rank's slice of one; None: uniform.
        z_loss: weight of `lse(z)²`, at least 0.
        logit_softcap: `cap` of `cap·tanh(z / cap)`; None: the model's own, or none.
        logit_scale: what logits are multiplied by; None: what the model itself does (Granite, Cohere), or nothing.
        on_stats: called with the `TokenStats` of each forward.
        chunk_bytes: what the logits of a chunk may take with the fused head; None: see
            `vocab_parallel_linear_cross_entropy`.
        logits_in_eval: whether `outputs.logits` are whole in evaluation (`model.eval()` and no gradient), as a metric
            needs them; False evaluates as it trains, without.

    Returns:
        The installed loss: `.remove()` undoes it, as does leaving it as a context manager.

    Raises:
        ValueError: for wrong options, or a model that has a loss installed already.
        UnsupportedModel: for a model that `check_model` refuses.

    Collectives:
        None here. In a forward those of the loss; where logits are gathered from a sharded head, two all-gathers.
    """
    options = LossOptions(
        label_smoothing, ignore_index, "mean", z_loss, logit_softcap, 1.0 if logit_scale is None else logit_scale
    )
    if problem := options.problem() or chunk_bytes_problem(chunk_bytes) or _prior_problem(smoothing_prior):
        raise ValueError(problem)
    model = causal_lm(model)
    check_model(model, head)
    if isinstance(model.loss_function, InstalledLoss):
        raise ValueError("this model has a smoothed loss installed already; call its .remove() first")
    scale = own_scale(model)
    if scale != 1 and logit_scale not in (None, scale):
        raise ValueError(
            f"this model multiplies its logits by {scale} itself, got logit_scale={logit_scale}; leave it out"
        )
    # what the model does itself is done whatever the head
    extras = (smoothing_prior, logit_softcap, None if logit_scale in (1, scale) else logit_scale)
    if head == "dense" and (z_loss > 0 or any(extra is not None for extra in extras)):
        raise ValueError(
            "head='dense' is F.cross_entropy: it has no smoothing_prior, z_loss, logit_softcap or logit_scale"
        )
    own = own_softcap(model)
    if own is not None and logit_softcap not in (None, own):
        raise ValueError(
            f"this model caps its logits at {own} itself, got logit_softcap={logit_softcap}; leave it out"
        )
    options = replace(
        options,
        logit_softcap=logit_softcap if own is None else own,
        logit_scale=options.logit_scale if scale == 1 else scale,
    )
    settings = Installation(options, head, smoothing_prior, on_stats, chunk_bytes, logits_in_eval)
    return InstalledLoss(model, settings)


def _prior_problem(prior: object) -> str | None:
    if prior is None or (isinstance(prior, Tensor) and prior.dim() == 1):
        return None
    got = f"shape {tuple(prior.shape)}" if isinstance(prior, Tensor) else type(prior).__name__
    return f"smoothing_prior must be a tensor of one dimension, a distribution or this rank's slice of one, got {got}"


def check_model(model: nn.Module, head: str) -> None:
    """Raise if this causal LM's loss cannot be replaced, or its output head cannot serve as this `head`.

    A loss cannot be replaced that is not a causal LM's, or that the model adds a z-loss of its own to. A head cannot
    be fused that is no linear layer; what a model does to its logits without saying so in its configuration raises in
    the first forward.

    Args:
        model: a Hugging Face causal LM.
        head: "fused", "sharded" or "dense".

    Raises:
        ValueError: for another `head`.
        UnsupportedModel: for a model that does not support it.
    """
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
    if problem := smoothing_problem(model) or (linear_problem(acting_head(model)) if head == "fused" else None):
        raise UnsupportedModel(problem)


def causal_lm(model: Any) -> Any:
    """Return the causal LM inside an engine, DDP, FSDP, `torch.compile` or PEFT: what has `loss_function` and a head.

    Args:
        model: the causal LM, or what wraps it.

    Raises:
        UnsupportedModel: if there is none.
    """
    # by its type: an engine answers for any attribute of its module, but setting one there does not reach the module
    while not hasattr(type(model), "get_output_embeddings") and (inner := _inside(model)) is not None:
        model = inner
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not hasattr(model, "loss_function") or model.get_output_embeddings() is None:
        raise UnsupportedModel(
            "expected a Hugging Face causal LM (with loss_function and output embeddings) or a DeepSpeed engine "
            f"around one, got {type(model).__name__}"
        )
    return model


def _inside(model: Any) -> nn.Module | None:
    """What a DeepSpeed engine, DDP and the like (`module`), `torch.compile` or the first FSDP wraps."""
    parts = (vars(model).get("_modules", {}).get(name) for name in WRAPPED)
    return next((part for part in parts if isinstance(part, nn.Module)), None)
