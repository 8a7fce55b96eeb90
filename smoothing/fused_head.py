"""The output head of a model that computes the loss itself, so that no logits are made while labels are there."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# What models multiply or divide their logits by, between head and loss; 1 is no change.
LOGIT_SCALES = ("logits_scaling", "logit_scale", "lm_head_multiplier")
Loss = Callable[[Tensor, nn.Module], Tensor]


class FusedHead:
    """Replaces `head.forward` while installed.

    Where `loss` is set, the head's forward gives `loss(hidden, head)` as `[1, 1, 1]` in place of logits, once; then
    and otherwise the logits as before. It happens in the head's own forward, so whatever gathers its weight (the
    hooks of ZeRO-3) and waits for its gradient works as for a plain head.
    """

    def __init__(self, head: nn.Module, softcap: float | None):
        self.head, self.softcap = head, softcap
        self.loss: Loss | None = None
        self._handed: Tensor | None = None
        self._checked = False
        self._own = vars(head).get("forward")
        self._plain = head.forward
        head.forward = self.forward

    def remove(self) -> None:
        """Put back the head's own forward."""
        if self._own is not None:
            self.head.forward = self._own
        else:
            vars(self.head).pop("forward", None)

    def forward(self, hidden: Tensor, *args, **kwargs) -> Tensor:
        loss, self.loss = self.loss, None
        if loss is None:
            return self._plain(hidden, *args, **kwargs)
        self._handed = loss(hidden, self.head).view(1, 1, 1)
        return self._handed

    def take(self, logits: Tensor) -> Tensor | None:
        """The loss, from what the model made of it in passing it on as "logits"; None if the head made none.

        Raises `ValueError` if the model changed it in a way that is not known: so it would have changed its logits.
        """
        handed, self._handed = self._handed, None
        if handed is None or logits is handed:
            return None if handed is None else logits.view(())
        if not self._checked:  # costs a synchronisation, hence once
            cap = self.softcap
            expected = (handed if cap is None else cap * torch.tanh(handed / cap)).detach().flatten()
            seen = logits.detach().flatten().to(expected.dtype)
            if seen.shape != expected.shape or not torch.allclose(seen, expected, rtol=1e-2, equal_nan=True):
                raise ValueError(
                    "this model changes its logits between output head and loss, which head='fused' never makes; "
                    "use install_smoothed_loss(head='sharded')"
                )
            self._checked = True
        # what was passed on may carry hooks (ZeRO-3's), and so has to stay on the path of the gradient
        return handed.view(()) + 0 * logits.sum()


def fusable_softcap(model: nn.Module, head: nn.Module, softcap: float | None) -> float | None:
    """The softcap that the loss must apply for this model. Raises `ValueError` if its head cannot be fused."""
    sharded = getattr(head, "is_vocab_parallel_lm_head", False)
    if not (sharded or type(head) is nn.Linear):
        raise ValueError(
            f"head='fused' needs a plain nn.Linear or DeepSpeed's VocabParallelLinear as output head, got "
            f"{type(head).__name__}; use head='sharded'"
        )
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for name in LOGIT_SCALES:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(
                f"this model scales its logits ({name}={getattr(config, name)}) after the head, which head='fused' "
                "does not; use head='sharded'"
            )
    own = getattr(config, "final_logit_softcapping", None)
    if own is not None and softcap is not None and own != softcap:
        raise ValueError(f"the model caps its logits at {own} already, got logit_softcap={softcap}; leave it out")
    return own if own is not None else softcap
