"""Steps whose loss or gradient is not finite: reported with their rows, and refused or skipped by all ranks."""

from collections.abc import Iterable
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from launch.common.errors import UserError
from launch.process.ranks import on_all_ranks, say

SHOWN = 8
IN_A_ROW = 20  # consecutive skipped steps after which the run is lost


class NonFiniteSteps:
    """Remembers, on the device, which rows had no finite loss since the last step, until a step was not applied.

    DeepSpeed decides that on all ranks together (`was_step_applied`).
    """

    def __init__(self, mode: str):
        self.mode = mode
        self.skipped = self.in_a_row = 0
        self._seen: list[tuple[list[str], Tensor]] = []

    def note(self, where: list[str], nll_BL: Tensor) -> None:
        """Note a micro-batch: where its rows come from, and its tokens' losses."""
        self._seen.append((where, nll_BL.isfinite().all(-1).view(-1)))

    def close(self, applied: bool, step: int, scaled: bool) -> None:
        """End a step. Raises `UserError` on all ranks if its update was not made and the mode is "stop".

        Args:
            applied: Whether the update was made, the same on all ranks.
            step: The step's number, for the message.
            scaled: fp16 loss scaling skips steps by design; only rows without a finite loss count then.

        Collectives:
            One gather of objects if the update was not made.
        """
        seen, self._seen = self._seen, []
        if applied:
            self.in_a_row = 0
            return
        bad = [row for where, finite in seen for row, good in zip(where, finite.tolist(), strict=True) if not good]
        everybody = on_all_ranks(lambda: (bad, [row for where, _ in seen for row in where]))
        bad, rows = (list(dict.fromkeys(chain(*parts))) for parts in zip(*everybody, strict=True))
        if scaled and not bad:
            return
        if bad:
            text = f"step {step}: the loss of {_some(bad)} is not finite"
        else:
            text = f"step {step}: the losses are finite, but a gradient is not; its rows are {_some(rows)}"
        if self.mode == "stop":
            raise UserError(
                f"{text}. The update was not made and the run stops; look at the rows, lower --learning_rate, or "
                "skip such steps with --on_nonfinite skip"
            )
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row == IN_A_ROW:
            raise UserError(f"{text}. {IN_A_ROW} consecutive steps were skipped: the run stops")
        say(f"{text}; step skipped ({self.skipped} so far)")


def not_finite(weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Return the names of weights that hold an infinity or NaN; under ZeRO 3, in this rank's part of each."""
    parts = [(name, _own_part(weight)) for name, weight in weights]
    finite = torch.stack([part.isfinite().all() for _, part in parts]).tolist() if parts else []
    return {name for (name, _), good in zip(parts, finite, strict=True) if not good}


def _own_part(weight: Tensor) -> Tensor:
    """Return what this rank holds of a weight; under ZeRO 3 a part, without the padding, which holds any values."""
    part = getattr(weight, "ds_tensor", None)
    if part is None:
        return weight.detach()
    start = part.numel() * dist.get_rank(weight.ds_process_group)  # type: ignore[attr-defined]
    return part.detach().flatten()[: max(0, weight.ds_numel - start)]  # type: ignore[attr-defined]


def check_weights(weights: Iterable[tuple[str, Tensor]], before: set[str], lost: str) -> None:
    """Raise `UserError` if a weight is not finite; a step with a finite loss and gradient can make such weights.

    Args:
        weights: Name and value of each.
        before: Names of those that were not finite when training began; they are ignored.
        lost: What is not done because of them, for the message.
    """
    if bad := sorted(not_finite(weights) - before):
        raise UserError(f"the weights are not finite any more ({_some(bad)}): {lost}; lower --learning_rate")


def _some(rows: list[str]) -> str:
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return ", ".join(rows[:SHOWN]) + more
