"""Estimate of the memory that a run needs on each rank, before it starts.

A formula, not a measurement: weights, gradients and optimizer as ZeRO shards them, the head's logits, and the
activations of a plain transformer layer. Fragmentation, communication buffers and the framework come on top.
"""

from dataclasses import dataclass

from launch.common.units import GIB
from smoothing.linear.chunks import default_chunk_bytes

# Values that a transformer layer keeps for backward, in units of tokens·hidden: the inputs of its matrix products,
# norms and activation function, with attention that keeps no score matrix.
KEPT_PER_LAYER = 34 / 2
KEPT_PER_CHECKPOINTED_LAYER = 1


@dataclass(frozen=True)
class Setup:
    """What the estimate depends on; sizes in elements, `tokens` of one micro-batch on one rank."""

    parameters: int
    trained: int  # of the parameters; fewer with adapters, and then not the head
    whole: int  # of the parameters: on every tensor-parallel rank
    whole_trained: int  # of those: trained
    hidden: int
    layers: int
    vocab: int
    tokens: int
    tensor_parallel: int
    data_parallel: int
    zero: int
    offload: bool
    low_precision: bool
    fp32_gradients: bool  # with low precision: accumulated in fp32
    checkpointing: bool
    head: str
    chunk_bytes: int | None
    device: bool  # an accelerator, not a CPU


def estimate(setup: Setup) -> dict[str, float]:
    """Estimate GiB per rank, by part and in `total`."""
    value_bytes = 2 if setup.low_precision else 4
    own = setup.whole + (setup.parameters - setup.whole) / setup.tensor_parallel
    trained = setup.whole_trained + (setup.trained - setup.whole_trained) / setup.tensor_parallel
    shards = setup.data_parallel
    weights = own * value_bytes / (shards if setup.zero >= 3 else 1)
    gradients = trained * (4 if setup.fp32_gradients else value_bytes) / (shards if setup.zero >= 2 else 1)
    if setup.fp32_gradients and setup.zero == 1:
        gradients += trained * value_bytes  # both, and neither is sharded
    # Adam's two moments, and with low precision an fp32 copy of the weights
    optimizer = trained * (12 if setup.low_precision else 8) / (shards if setup.zero >= 1 else 1)
    if setup.offload:
        weights, optimizer = 0.0, 0.0
    kept = KEPT_PER_CHECKPOINTED_LAYER if setup.checkpointing else KEPT_PER_LAYER
    activations = setup.tokens * setup.hidden * setup.layers * kept * value_bytes
    head_bytes = _head_bytes(setup, value_bytes)
    # ZeRO 1 and 2 update from a flat copy of the gradients, in fp32, after activations and logits are freed
    step = trained / shards * (6 if setup.low_precision else 4) if setup.zero in (1, 2) else 0.0
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": activations,
        "head": head_bytes,
        "more in the update": max(0.0, step - activations - head_bytes),
    }
    return {name: size / GIB for name, size in parts.items()} | {"total": sum(parts.values()) / GIB}


def _head_bytes(setup: Setup, value_bytes: int) -> float:
    """Bytes of the head beyond its weight and gradient; a large vocabulary has its peak here."""
    if setup.head == "dense":
        # gathered logits, and in fp32: logits, log-softmax and gradient
        return setup.tokens * setup.vocab * (value_bytes + 3 * 4)
    if setup.head == "sharded":
        return setup.tokens * setup.vocab / setup.tensor_parallel * 2 * value_bytes
    weight = setup.vocab // setup.tensor_parallel * setup.hidden * 4
    chunks = setup.chunk_bytes or default_chunk_bytes(weight, setup.device)
    if not setup.low_precision or setup.trained < setup.parameters:
        return chunks
    # the weight gradient summed in fp32, and the chunks, which use the space that the rounded gradient takes later
    return weight + max(0.0, chunks - weight / 2)
