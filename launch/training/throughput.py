"""What a run computes a second, against what its devices could: model FLOP utilisation.

    operations = Σ_w (4 + 2·[w is trained])·tokens, of the head's weight label tokens where the head is fused
    mfu        = operations / (seconds · ranks · the device's dense bf16 rate as its maker states it)

Over the weights w of matrix products: all of two dimensions or more but embeddings that no head shares, a tied head
once, and of a layer's experts the share that a token goes to. Left out: attention's own products, what checkpointing
computes again, padding. Trainer's count is of a rank's own weights, and so wrong under tensor parallelism.
"""

from dataclasses import dataclass
from typing import Any

import torch

from launch.process.device import uses_gpu

# Operations a second of dense bf16 products, by a part of the device's name; the first that fits.
RATES = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Operations:
    """Of the weights' products, forward and backward."""

    per_token: float
    per_label_token: float

    @classmethod
    def of(cls, model: Any, fused: bool) -> "Operations":
        """Count those of a causal LM that has not been split over ranks."""
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        text = model.config.get_text_config()
        experts = next((count for name in EXPERTS if (count := getattr(text, name, None))), 0)
        share = getattr(text, "num_experts_per_tok", experts) / experts if experts else 1.0
        body = of_head = 0.0
        for name, weight in model.named_parameters():
            size = getattr(weight, "ds_numel", weight.numel())  # the whole of what ZeRO 3 has split
            operations = size * (6 if weight.requires_grad else 4)
            if weight is head:
                of_head = operations
            elif weight is not embedding and len(getattr(weight, "ds_shape", weight.shape)) > 1:
                body += operations * (share if ".experts." in name else 1.0)
        return cls(body, of_head) if fused else cls(body + of_head, 0.0)

    def utilisation(self, tokens: int, label_tokens: int, seconds: float, ranks: int) -> float | None:
        """Return MFU over all ranks; None where the device's rate is not known."""
        if (rate := device_rate()) is None:
            return None
        done = self.per_token * tokens + self.per_label_token * label_tokens
        return done / max(seconds, 1e-9) / (ranks * rate)


def device_rate() -> float | None:
    """Return the operations a second that this device's maker states, or None."""
    if not uses_gpu():
        return None
    name = torch.cuda.get_device_name()
    return next((rate for part, rate in RATES.items() if part in name), None)
