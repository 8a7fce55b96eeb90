"""A model's output head while a loss is installed: it gives what the forward under way asks for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smoothing.model.forward_state import ForwardState, Gives
from smoothing.model.gather_logits import gather_logits
from smoothing.model.support import UnsupportedModel
from smoothing.shard import VocabShard

# What travels to the loss beside the loss itself: known numbers (a range: made where they are needed, without a copy
# from the host) that show what the model does to its logits.
PROBES = (-2, 9, 5)


class OutputHead:
    """Replaces `lm_head.forward` until `remove`.

    It happens in the head's own forward, so whatever gathers its weight (the hooks of ZeRO-3) and waits for its
    gradient works as for a plain head. `softcap`: what the model itself caps its logits with, after the head.
    """

    def __init__(self, lm_head: nn.Module, shard: VocabShard | None, softcap: float | None):
        self.lm_head, self.shard, self.softcap = lm_head, shard, softcap
        self.forward_state = ForwardState()
        self._probed = False
        self._own = vars(lm_head).get("forward")
        self._plain = lm_head.forward
        lm_head.forward = self.forward

    def remove(self) -> None:
        """Put back the head's own forward."""
        if self._own is not None:
            self.lm_head.forward = self._own
        else:
            vars(self.lm_head).pop("forward", None)

    @contextmanager
    def giving(self, forward_state: ForwardState) -> Iterator[None]:
        """Hold the state of one forward of the model; it ends with that forward, also where that raises."""
        before, self.forward_state = self.forward_state, forward_state
        try:
            yield
        finally:
            self.forward_state = before

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs in the place of `lm_head.forward`. Collectives: two all-gathers for all logits of a sharded head."""
        state = self.forward_state
        if state.gives is Gives.LOSS:
            if state.placeholder is not None:
                raise UnsupportedModel(
                    "this model calls its output head more than once in a forward, and head='fused' cannot tell "
                    "which call its labels are for; use head='sharded'"
                )
            assert state.loss is not None, "what the head gives"
            loss = state.loss(hidden, self.lm_head)
            probes = torch.arange(*PROBES, dtype=loss.dtype, device=loss.device)
            state.placeholder = torch.cat([loss.view(1), probes]).view(1, 1, -1)
            return state.placeholder
        logits: Tensor = self._plain(hidden, *args, **kwargs)
        if self.shard is not None and state.gives is Gives.ALL_LOGITS:
            return gather_logits(logits, self.shard)
        return logits

    def loss_behind(self, logits: Tensor) -> Tensor:
        """The loss, from what the model made of the placeholder in passing it on as "logits".

        Raises `UnsupportedModel` if the model did more to it than its softcap: so it would have changed its logits.
        """
        assert self.forward_state.placeholder is not None, "the head has computed a loss"
        placeholder = self.forward_state.placeholder.flatten()
        seen = logits.flatten()
        if not self._probed or logits.device.type == "cpu":  # on a device it costs a synchronisation, hence once
            cap, probes = self.softcap, placeholder[1:].detach()
            expected = probes if cap is None else cap * torch.tanh(probes / cap)
            rtol = max(1e-5, 8 * torch.finfo(logits.dtype).eps)
            same_shape = seen.shape == placeholder.shape
            if not same_shape or not torch.allclose(seen[1:].detach().to(expected.dtype), expected, rtol=rtol):
                raise UnsupportedModel(
                    "this model changes its logits between output head and loss, which head='fused' never makes; "
                    "use head='sharded'"
                )
            self._probed = True
        # what was passed on may carry hooks (ZeRO-3's), and so has to stay on the path of the gradient
        return placeholder[0] + 0 * seen[1]
