"""A model's output head while a loss is installed: it gives what the forward under way asks for."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoothing.core.dtensor import is_dtensor, shard_of
from smoothing.model.forward_state import ForwardState, Gives
from smoothing.model.gather_logits import gather_logits
from smoothing.model.support import UnsupportedModel
from smoothing.shard import VocabShard

# What travels to the loss beside the loss itself: known numbers (a range: made where they are needed, without a copy
# from the host) that show what the model does to its logits.
PROBES = (-2, 9, 5)


class Untraced:
    """A method that `torch.compile` calls as it is. Made when a loss is installed, since this imports its compiler.

    Counting labels, collectives and checks of arguments have no graph: traced, they break it into dozens, which takes
    longer to compile than a model of two layers, and computes nothing faster. An object, so that the method of a deep
    copy is the copy's own.
    """

    def __init__(self, method: Callable[..., Any]):
        self._method = method
        reason = "the loss counts labels on the host; the rest of it is matrix products"
        self._call = torch.compiler.disable(method, reason=reason)  # type: ignore[no-untyped-call]  # torch has no types for it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Untraced":
        return Untraced(copy.deepcopy(self._method, memo))


class OutputHead:
    """Replaces `lm_head.forward` until `remove`.

    It happens in the head's own forward, so whatever gathers its weight (the hooks of ZeRO-3 and FSDP) and waits for
    its gradient works as for a plain head. `scale`, `softcap`: what the model itself multiplies its logits by and
    caps them with, after the head.
    """

    def __init__(self, lm_head: nn.Module, shard: VocabShard | None, scale: float, softcap: float | None):
        self.lm_head, self.shard, self.scale, self.softcap = lm_head, shard, scale, softcap
        self.forward_state = ForwardState()
        self._probed = False
        self._own = vars(lm_head).get("forward")
        self._plain = lm_head.forward
        lm_head.forward = Untraced(self.forward)

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
        weight: Any = getattr(self.lm_head, "weight", None)
        state.shard = shard_of(weight) if self.shard is None and is_dtensor(weight) else self.shard
        if state.gives is Gives.LOSS:
            return self._loss_as_logits(hidden)
        if state.gives is Gives.OWN_LOGITS and is_dtensor(weight) and not is_dtensor(hidden):
            return self._own_columns(hidden)  # the head's own forward might gather them
        logits: Tensor = self._plain(hidden, *args, **kwargs)
        if self.shard is not None and state.gives is Gives.ALL_LOGITS:
            return gather_logits(logits, self.shard)
        return logits

    def _loss_as_logits(self, hidden: Any) -> Tensor:
        state = self.forward_state
        if state.placeholder is not None:
            raise UnsupportedModel(
                "this model calls its output head more than once in a forward, and head='fused' cannot tell "
                "which call its labels are for; use head='sharded'"
            )
        assert state.loss is not None, "what the head gives"
        loss = state.loss(hidden, self.lm_head)
        probes = torch.arange(*PROBES, dtype=loss.dtype, device=loss.device)
        state.placeholder = torch.cat([loss.view(1), probes]).view(1, 1, -1)
        if not is_dtensor(hidden):
            return state.placeholder
        from torch.distributed.tensor import DTensor, Shard

        # as the logits of a head that torch has split would be, for what follows the head
        as_logits: Tensor = DTensor.from_local(state.placeholder, hidden.device_mesh, [Shard(2)], run_check=False)
        return as_logits

    def _own_columns(self, hidden: Tensor) -> Tensor:
        """This rank's logits, by the head's weight, a DTensor. Collectives: backward sums the hidden gradient."""
        from torch.distributed.tensor import DTensor, Replicate

        weight: Any = self.lm_head.weight
        whole = DTensor.from_local(
            hidden, weight.device_mesh, [Replicate()] * weight.device_mesh.ndim, run_check=False
        )
        logits: Any = F.linear(whole, weight, self.lm_head.bias)  # type: ignore[arg-type]  # a head has a tensor or None
        own: Tensor = logits.to_local()
        return own

    def loss_behind(self, logits: Any) -> Tensor:
        """The loss, from what the model made of the placeholder in passing it on as "logits".

        Raises `UnsupportedModel` if the model did more to it than its scale and its softcap: so it would have changed
        its logits.
        """
        assert self.forward_state.placeholder is not None, "the head has computed a loss"
        placeholder = self.forward_state.placeholder.flatten()
        seen: Tensor = (logits.to_local() if is_dtensor(logits) else logits).flatten()
        if not self._probed or seen.device.type == "cpu":  # on a device it costs a synchronisation, hence once
            if not self._as_expected(seen, placeholder[1:].detach()):
                raise UnsupportedModel(
                    "this model changes its logits between output head and loss, which head='fused' never makes; "
                    "use head='sharded'"
                )
            self._probed = True
        # what was passed on may carry hooks (ZeRO-3's), and so has to stay on the path of the gradient
        return placeholder[0] + 0 * seen[1]

    def _as_expected(self, seen: Tensor, probes: Tensor) -> bool:
        """Whether the probes, of this rank or one rank after the other, are what the model makes of logits."""
        shard, each = self.forward_state.shard, len(probes) + 1
        if seen.numel() not in (each, each * (1 if shard is None else shard.world_size)):
            return False
        expected = self.scale * probes
        if self.softcap is not None:
            expected = self.softcap * torch.tanh(expected / self.softcap)
        rtol = max(1e-5, 8 * torch.finfo(seen.dtype).eps)
        seen = seen.detach().view(-1, each)[:, 1:].to(expected.dtype)
        return torch.allclose(seen, expected.expand_as(seen), rtol=rtol)
