"""Whether a model keeps packed rows apart: tried on the model itself, since its kind does not tell.

transformers builds a mask from positions that restart, where a model's code passes them on. Some do not (OPT, Falcon,
BLOOM, gpt-oss), and layers that carry a state or a convolution from token to token never see the positions.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from launch.common.messages import error_line
from launch.data.packing import PadPacked

ROWS = (7, 9, 5, 6)  # tokens of the rows that are tried: two in each of two sequences
NOISE = 4  # times what changes in rows that are not packed at all, where rounding depends on other rows
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}  # mean relative difference of logits; other dtypes: 0.1
TOKENS = 64  # of a row: more than enough to differ
LEAVE_OUT = "; leave --packing out"
Rows = Sequence[Sequence[int]]


def packing_problem(model: PreTrainedModel) -> str | None:
    """Return why rows cannot be packed for this model, as far as its configuration tells, or None."""
    configs = (model.config, model.config.get_text_config())
    if any(getattr(config, "output_router_logits", False) for config in configs):
        return (
            "--packing: the loss of this model's router counts padding, which packed rows cannot tell it; set "
            f"output_router_logits to false{LEAVE_OUT.replace(';', ', or')}"
        )
    return None


def takes_bounds(model: PreTrainedModel) -> bool:
    """Return whether the model's attention has to be told where packed rows begin and end."""
    return "flash" in (getattr(model.config.get_text_config(), "_attn_implementation", None) or "")


def distinct_tokens(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return different tokens of a row, in their order, and EOS in case that there is one only."""
    return list(dict.fromkeys([*map(int, ids[:TOKENS]), tokenizer.eos_token_id]))


def leak_problem(
    model: nn.Module, name: str, collate: PadPacked, tokens: Sequence[int], device: torch.device
) -> str | None:
    """Return in a sentence that packed rows have other logits than each alone, or None if they have not.

    A row is changed; the logits of the other rows must stay as they are, bit for bit. Where rounding depends on other
    rows even if they are not packed, as with experts on a GPU, they may change as much as that. Then packed logits
    are compared with those of rows alone, which have other positions in a model that ignores the given ones. Modes,
    buffers and random generators of the model are as before.

    Args:
        model: What is called, an engine perhaps. On several ranks all must call this.
        name: The model's name for the message.
        collate: The collator of the run.
        tokens: Token ids that the model may be given, two different ones at least.
        device: Where the model is.

    Collectives:
        Those of six forward passes at most.
    """

    def logits(rows: Rows, packed: bool = True) -> list[Tensor]:
        groups = [rows[:2], rows[2:]] if packed else [[row] for row in rows]
        batch = collate([_sequence(group) for group in groups])
        names = batch.keys() - {"labels", "label_tokens", "tokens", "where"}
        inputs = {key: batch[key].to(device) if isinstance(batch[key], Tensor) else batch[key] for key in names}
        found = model(**inputs).logits
        ends = [[len(row) for row in group] for group in groups]
        return [part for row, sizes in zip(found, ends, strict=True) for part in row[: sum(sizes)].split(sizes)]

    rows = _rows(tokens)
    changed = [[*rows[:index], _rows([*tokens[1:], tokens[0]])[index], *rows[index + 1 :]] for index in (0, 1)]
    try:
        with _undisturbed(model, device):
            packed = logits(rows)
            alone = logits(rows, packed=False)
            leak = max(_change(packed, logits(other), index) for index, other in enumerate(changed))
            noise = 0.0
            if leak:
                noise = max(_change(alone, logits(other, packed=False), index) for index, other in enumerate(changed))
    except TypeError as error:
        return f"--packing: {name} cannot be given packed rows ({error_line(error)}){LEAVE_OUT}"
    if leak > NOISE * noise:
        return (
            f"--packing: {name} attends across packed rows: a change of one row changes the logits of another by "
            f"{leak:.0e}{LEAVE_OUT}"
        )
    if (difference := _difference(packed, alone)) > ROUNDING.get(packed[0].dtype, 0.1):
        return (
            f"--packing: {name} ignores position_ids: the logits of packed rows differ by {difference:.0e} from "
            f"those of the same rows alone{LEAVE_OUT}"
        )
    return None


def _sequence(rows: Rows) -> Mapping[str, Any]:
    ids = [token for row in rows for token in row]
    return {"input_ids": ids, "labels": ids, "lengths": [len(row) for row in rows]}


def _rows(tokens: Sequence[int]) -> list[list[int]]:
    """Rows of these tokens in turn; of rotated tokens they differ in every place where neighbours do."""
    repeated = [*tokens] * (sum(ROWS) // len(tokens) + 1)
    starts = [sum(ROWS[:index]) for index in range(len(ROWS))]
    return [repeated[start : start + length] for start, length in zip(starts, ROWS, strict=True)]


def _change(before: list[Tensor], after: list[Tensor], changed: int) -> float:
    """The largest change of a logit in rows other than the changed one; infinite instead of NaN."""
    others = [index for index in range(len(before)) if index != changed]
    if all(torch.equal(before[index], after[index]) for index in others):
        return 0.0
    largest = max((after[index].float() - before[index].float()).abs().max().item() for index in others)
    return math.inf if math.isnan(largest) else largest


def _difference(packed: list[Tensor], alone: list[Tensor]) -> float:
    """The mean difference of logits, relative to their mean size."""
    one, other = (torch.cat(parts).float() for parts in (packed, alone))
    return ((one - other).abs().mean() / other.abs().mean()).item()


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluate without gradients; afterwards modes, buffers and random generators are as they were."""
    modes = {module: module.training for module in model.modules()}
    buffers = {
        (module, name): (buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    }
    here = [device] if device.type == "cuda" else []
    try:
        model.eval()
        with torch.random.fork_rng(here), torch.no_grad():
            yield
    finally:
        for (module, name), (buffer, value) in buffers.items():
            module._buffers[name] = buffer.copy_(value)
        for module, mode in modes.items():
            module.training = mode
