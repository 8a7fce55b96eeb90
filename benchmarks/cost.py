"""What the fused head costs one rank, from sizes alone: operations, memory, bytes on the wire, seconds.

`docs/scaling.md` explains the formulas; `scaling.py` holds them against measurements and tabulates them.
Legend: N labelled tokens, V vocabulary, R ranks that share it, S = ⌈V/R⌉ rows of the weight on one rank, H hidden.
"""

from dataclasses import dataclass
from math import ceil

from smoothing.linear.chunks import chunk_length, default_chunk_bytes

FP32 = 4
HEADER_BYTES = 72
STATISTICS_BYTES = 12  # a token: maximum, sum of exponentials, label's logit
# Read and written for each element of a chunk of logits between the products, where these run in bf16: a product
# writes 4, the statistics' kernel reads 4, the gradient's reads 4 and writes 2.
DEVICE_TILE_BYTES = 14


@dataclass(frozen=True)
class Sizes:
    """One loss call on one of R ranks. `weight_bytes`: of an element of the weight and of its gradient."""

    tokens: int
    vocab: int
    hidden: int
    ranks: int = 1
    weight_bytes: int = FP32
    device: bool = False

    @property
    def shard(self) -> int:
        return ceil(self.vocab / self.ranks)

    @property
    def chunk_tokens(self) -> int:
        """Tokens whose logits exist at a time: what fits the budget, shared by the buffers in use."""
        budget = default_chunk_bytes(self.shard * self.hidden * FP32, self.device)
        return min(self.tokens, chunk_length(self.tokens, max(1, budget // (self._tile_bytes * self.shard))))

    @property
    def chunks(self) -> int:
        return ceil(self.tokens / self.chunk_tokens)

    @property
    def operations(self) -> int:
        """Multiplications and additions of the three products: 6·N·S·H."""
        return 6 * self.tokens * self.shard * self.hidden

    @property
    def tile_elements(self) -> int:
        """Logits that this rank makes over the call: N·S."""
        return self.tokens * self.shard

    @property
    def peak_bytes(self) -> int:
        """Over the inputs: both gradients in fp32 and chunks of logits; or, when those are gone, what is rounded."""
        weight, hidden = self.hidden * self.shard, self.hidden * self.tokens
        chunk = self._tile_bytes * self.chunk_tokens * self.shard
        rounded = self.weight_bytes * (weight + hidden) if self.weight_bytes != FP32 else 0
        return max(FP32 * (weight + hidden) + chunk, FP32 * weight + rounded)

    @property
    def sum_bytes(self) -> int:
        """On a device, what each chunk reads and writes of the sum of the weight's gradient."""
        return 2 * FP32 * self.shard * self.hidden * self.chunks if self.device else 0

    @property
    def messages(self) -> int:
        """Collectives of a call: the handshake, the mean row, and two for each chunk."""
        return 2 + 2 * self.chunks if self.ranks > 1 else 0

    @property
    def gathered_bytes(self) -> int:
        """Bytes that this rank passes to all-gathers."""
        return HEADER_BYTES + STATISTICS_BYTES * self.tokens if self.ranks > 1 else 0

    @property
    def reduced_bytes(self) -> int:
        """Bytes that this rank passes to all-reduces: the mean row, and the hidden states' gradient."""
        return FP32 * (self.hidden + 1 + self.tokens * self.hidden) if self.ranks > 1 else 0

    @property
    def wire_bytes(self) -> float:
        """What this rank sends on a ring: gathers go round once, sums twice."""
        others = self.ranks - 1
        return others * self.gathered_bytes + 2 * others / self.ranks * self.reduced_bytes

    @property
    def gathering_wire_bytes(self) -> float:
        """The same if the logits themselves were gathered in fp32, beside the sum of the hidden states' gradient."""
        others = self.ranks - 1
        logits, gradient = FP32 * self.tokens * self.shard, FP32 * self.tokens * self.hidden
        return others * logits + 2 * others / self.ranks * gradient

    @property
    def _tile_bytes(self) -> int:
        """Of one logit of a chunk. Where a device's ranks wait for one another, the next chunk's logits are made."""
        return FP32 * (2 if self.device and self.ranks > 1 else 1)


@dataclass(frozen=True)
class Machine:
    """What a rank sustains a second: operations, logits between the products, bytes on the wire, bytes of memory."""

    operations: float
    tile_elements: float
    wire: float
    latency: float  # seconds a collective
    memory: float = 1.0

    def seconds(self, sizes: Sizes) -> float:
        """Nothing overlapped: an upper bound for a device, what happens where ranks have no spare core."""
        return (
            sizes.operations / self.operations
            + sizes.tile_elements / self.tile_elements
            + sizes.wire_bytes / self.wire
            + sizes.messages * self.latency
            + sizes.sum_bytes / self.memory
        )
