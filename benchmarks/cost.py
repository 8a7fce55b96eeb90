"""What the fused head costs one rank, from sizes alone: operations, memory, bytes on the wire, seconds.

`docs/scaling.md` explains the formulas; `scaling.py` holds them against measurements and tabulates them.
Legend: N labelled tokens, V vocabulary, R ranks that share it, S = ⌈V/R⌉ rows of the weight on one rank, H hidden.
"""

from dataclasses import dataclass
from math import ceil

from smoothing.linear.chunks import bf16_groups, chunk_length, default_chunk_bytes

FP32 = 4
HEADER_BYTES = 72
STATISTICS_BYTES = 12  # a token: maximum, sum of exponentials, label's logit
BF16 = 2
# Read and written for each logit between the products, where these run in bf16: a product writes 2, the statistics'
# kernel reads 2, the gradient's reads 2 and writes 2.
DEVICE_TILE_BYTES = 8


@dataclass(frozen=True)
class Sizes:
    """One loss call on one of R ranks, in fp32; on a device in bf16."""

    tokens: int
    vocab: int
    hidden: int
    ranks: int = 1
    device: bool = False

    @property
    def shard(self) -> int:
        return ceil(self.vocab / self.ranks)

    @property
    def groups(self) -> list[list[slice]]:
        """On a device: the pieces of each group, whose logits exist at a time."""
        return bf16_groups(self.tokens, self.shard, self.hidden, True, self.ranks > 1, None)

    @property
    def chunk_tokens(self) -> int:
        """Tokens whose logits exist at a time: what fits the budget."""
        if self.device:
            return max(group[-1].stop - group[0].start for group in self.groups)
        budget = default_chunk_bytes(self.shard * self.hidden * FP32, False)
        return min(self.tokens, chunk_length(self.tokens, max(1, budget // (FP32 * self.shard))))

    @property
    def chunks(self) -> int:
        """How often statistics and a part of the hidden gradient travel."""
        return sum(map(len, self.groups)) if self.device else ceil(self.tokens / self.chunk_tokens)

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
        """Over the inputs: both gradients in fp32 and a chunk of logits.

        On a device hidden states in bf16 and their gradient in fp32, a group's logits, and the weight's gradient, in
        fp32 if there are several groups; or, when the logits are gone, the gradients as they are returned.
        """
        weight, hidden = self.hidden * self.shard, self.hidden * self.tokens
        if not self.device:
            return FP32 * (weight + hidden) + FP32 * self.chunk_tokens * self.shard
        sum_bytes = FP32 * weight if len(self.groups) > 1 else 0
        logits = BF16 * self.chunk_tokens * self.shard
        result = BF16 * weight
        return max((BF16 + FP32) * hidden + logits + (sum_bytes or result), sum_bytes + result + BF16 * hidden)

    @property
    def sum_bytes(self) -> int:
        """On a device, what groups read and write of a sum of the weight's gradient beside one product's result."""
        return 2 * FP32 * self.shard * self.hidden * (len(self.groups) - 1) if self.device else 0

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
        row = self.hidden if self.device else self.hidden + 1
        return FP32 * (row + self.tokens * self.hidden) if self.ranks > 1 else 0

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
