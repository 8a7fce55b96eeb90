"""Steps whose loss or gradient is not finite: told with their rows, and stopped or left out on all ranks together."""

from collections.abc import Iterable
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor

from launch.common.errors import UserError
from launch.process.ranks import on_all_ranks, say

SHOWN = 8
IN_A_ROW = 20  # steps left out one after another, after which there is nothing to hope for


class NonFiniteSteps:
    """Remembers which rows had no finite loss since the last step, on the device, until a step turns out to be one.

    That a step's update was not made is DeepSpeed's finding, agreed on by all ranks (`was_step_applied`).
    """

    def __init__(self, mode: str):
        self.mode = mode
        self.skipped = self.in_a_row = 0
        self._seen: list[tuple[list[str], Tensor]] = []

    def note(self, where: list[str], nll_BL: Tensor) -> None:
        """One micro-batch: where its rows come from, and its tokens' losses."""
        self._seen.append((where, nll_BL.isfinite().all(-1).view(-1)))

    def close(self, applied: bool, step: int, scaled: bool) -> None:
        """The step is over. Raises `UserError` on all ranks if its update was not made and the mode is "stop".

        `scaled`: fp16 loss scaling leaves steps out by design; only rows without a finite loss count then.
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
                "leave such steps out with --on_nonfinite skip"
            )
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row == IN_A_ROW:
            raise UserError(f"{text}. {IN_A_ROW} steps were left out one after another: the run stops")
        say(f"{text}; step left out ({self.skipped} so far)")


def not_finite(weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Names of the weights that hold an infinity or NaN. Under ZeRO 3 a rank looks at its own part of each."""
    parts = [(name, _own_part(weight)) for name, weight in weights]
    finite = torch.stack([part.isfinite().all() for _, part in parts]).tolist() if parts else []
    return {name for (name, _), good in zip(parts, finite, strict=True) if not good}


def _own_part(weight: Tensor) -> Tensor:
    """What this rank holds of a weight: under ZeRO 3 a part, without the padding, which nobody ever wrote."""
    part = getattr(weight, "ds_tensor", None)
    if part is None:
        return weight.detach()
    start = part.numel() * dist.get_rank(weight.ds_process_group)
    return part.detach().flatten()[: max(0, weight.ds_numel - start)]


def check_weights(weights: Iterable[tuple[str, Tensor]], before: set[str], lost: str) -> None:
    """Raise `UserError` if weights are not finite that were `before`, at the start; `lost`: what is not done now.

    A step whose loss and gradient were finite can make such weights.
    """
    if bad := sorted(not_finite(weights) - before):
        raise UserError(f"the weights are not finite any more ({_some(bad)}): {lost}; lower --learning_rate")


def _some(rows: list[str]) -> str:
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return ", ".join(rows[:SHOWN]) + more
