"""Ranks that share a vocabulary find out together whether they agree, and fail together.

Where there are several, each loss sends a header of nine int64 (72 bytes): a rank whose arguments are wrong still
takes part, and every other rank learns of it in the very collective that it would otherwise have waited in.

The loss from logits sends it in front of its statistics, in the same all-gather. The first time that a shard is used
it is exchanged once more, alone and before anything else: only then can ranks with different numbers of tokens be
told so (afterwards such a call ends in an error of the backend). The fused head, whose statistics travel in chunks,
always sends it alone and first, while it sums up `w̄`: that is a meeting.

On the CPU headers are read in every call. On a device that would be a host synchronisation a step, so they are read
the first time a shard is used; later they are compared there and `torch._assert_async` ends the step if they differ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from smoothing.core.collectives import all_gather, start_all_gather
from smoothing.shard import VocabShard

HEADER_FIELDS = 9
ALIKE = slice(3, 8)  # of the fields: what all ranks must say alike
FLOATS = 7  # the first of them
REFUSED, START, TOKENS, BATCH, PRIOR_MASS = 0, 1, 4, 6, 8
MIXERS = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # of splitmix64
PRIOR_MASS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Header:
    """What a rank says of its call. `refused`: its own arguments are wrong and it is about to raise."""

    refused: bool
    start: int
    stop: int
    vocab_size: int
    tokens: int
    digest: int
    batch: int
    label_smoothing: float
    prior_mass: float

    @classmethod
    def refusal(cls) -> "Header":
        """Of a rank that is about to raise, whatever it was given."""
        return cls(True, 0, 0, 0, 0, 0, 0, 0.0, 0.0)

    def encode(self) -> Tensor:
        """`[9]` int64; the floats as their bits, so that they can travel among integers."""
        integers = (int(self.refused), self.start, self.stop, self.vocab_size, self.tokens, self.digest, self.batch)
        floats = torch.tensor([self.label_smoothing, self.prior_mass], dtype=torch.float64)
        return torch.cat([torch.tensor(integers, dtype=torch.int64), floats.view(torch.int64)])

    @classmethod
    def decode_all(cls, headers_RH: Tensor) -> list["Header"]:
        """All ranks' headers, on the host; on a device this waits for them."""
        headers_RH = headers_RH.cpu()
        integers, floats = headers_RH[:, :FLOATS].tolist(), headers_RH[:, FLOATS:].contiguous().view(torch.float64)
        return [cls(bool(i[0]), *i[1:], *f) for i, f in zip(integers, floats.tolist(), strict=True)]


def batch_checksum(target_T: Tensor, num_items_in_batch: int | Tensor | None) -> Tensor:
    """A number that tells batches apart: of the labels in their places, and of what the loss is divided by.

    `[]` int64, on the target's device and without a synchronisation. Probabilities differ from rank to rank, as
    their columns do, and are left out.
    """
    total = torch.zeros((), dtype=torch.int64, device=target_T.device)
    if not target_T.is_floating_point():
        places_T = torch.arange(len(target_T), device=target_T.device)
        mixed_T = (target_T + places_T * MIXERS[0]) * MIXERS[1]
        for mixer in MIXERS[1:]:  # not linear, so that labels which change places do not cancel out
            mixed_T = (mixed_T ^ (mixed_T >> 31)) * mixer
        total = mixed_T.sum()
    if num_items_in_batch is None:
        return total
    if isinstance(num_items_in_batch, Tensor):
        return total + num_items_in_batch.reshape(()).to(total.device, torch.int64)
    return total + int(num_items_in_batch)


def meet_once(header_H: Tensor, shard: VocabShard) -> None:
    """Exchange the headers alone, the first time that this shard is used: keep a shard, and it is done once.

    Raises `ValueError` on every rank if any rank refused its arguments or the ranks do not agree.
    Collectives: one all-gather of 72 bytes a rank, once for each `VocabShard`. Remembering bounds instead would part
    the ranks when a vocabulary is cut anew and some of them keep theirs.
    """
    if shard.widest is not None:
        return
    shard.note_met(_widest(Header.decode_all(all_gather(header_H, shard)), shard.rank))


class Meeting(NamedTuple):
    """What ranks that agree know of one another."""

    headers_RH: Tensor | None  # [R, 9]; None for one rank
    widest: int  # columns of the largest shard, on the host


def start_meeting(header_H: Tensor, shard: VocabShard) -> Callable[[], Meeting]:
    """Send the header alone, whatever was agreed on before; calling what is returned ends the meeting.

    That call raises `ValueError` on every rank if any rank refused its arguments or the ranks do not agree. On a
    device only the first for a shard reads the headers on the host: later ones assert there.
    Collectives: one all-gather of 72 bytes a rank.
    """
    wait = start_all_gather(header_H, shard)
    known = shard.widest is not None

    def end() -> Meeting:
        headers_RH = wait()
        if known and headers_RH.device.type != "cpu":
            check(headers_RH, shard.rank)
        else:
            shard.note_met(_widest(Header.decode_all(headers_RH), shard.rank))
        return Meeting(headers_RH, shard.widest)

    return end


def _widest(headers: list[Header], rank: int) -> int:
    """Columns of the largest shard, of ranks that agree; raises `ValueError` if they do not."""
    raise_disagreement(headers, rank)
    return max(header.stop - header.start for header in headers)


def exchange(stats_FT: Tensor, header_H: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Give every rank the statistics of all: `stats_RFT` and the headers `[R, 9]` that came with them.

    Collectives: one all-gather of 72 + stats bytes a rank.
    """
    message = torch.cat([header_H.view(stats_FT.dtype), stats_FT.flatten()])
    messages_R = all_gather(message, shard)
    width = message.numel() - stats_FT.numel()
    headers_RH = messages_R[:, :width].contiguous().view(torch.int64)
    return messages_R[:, width:].unflatten(1, stats_FT.shape), headers_RH


def check(headers_RH: Tensor, rank: int) -> None:
    """Raise if the ranks do not agree: `ValueError` on the CPU, a device-side assertion on a device."""
    if headers_RH.device.type == "cpu":
        raise_disagreement(Header.decode_all(headers_RH), rank)
    else:
        alike = (headers_RH[:, ALIKE] == headers_RH[rank, ALIKE]).all()
        mass = headers_RH[:, PRIOR_MASS].contiguous().view(torch.float64).sum()
        whole = (mass - 1).abs() <= PRIOR_MASS_TOLERANCE
        torch._assert_async((headers_RH[:, REFUSED] == 0).all() & alike & whole)


def raise_disagreement(headers: list[Header], rank: int) -> None:
    """Raise the `ValueError` that `disagreement` words, if it finds one."""
    if fault := disagreement(headers, rank):
        raise ValueError(fault)


def disagreement(headers: list[Header], rank: int) -> str | None:
    """What keeps these ranks from computing one loss, said to `rank`; None if nothing does."""
    refused = [other for other, header in enumerate(headers) if header.refused]
    if refused:
        return f"rank(s) {refused} of this vocabulary's group refused their arguments and raised; see the error there"
    own = headers[rank]
    for other, header in enumerate(headers):
        for name in ("vocab_size", "tokens", "label_smoothing", "digest"):
            here, there = getattr(own, name), getattr(header, name)
            if here != there:
                what = "another argument (ignore_index, reduction, ..., dtype)" if name == "digest" else name
                values = "" if name == "digest" else f": {here} here (rank {rank}), {there} on rank {other}"
                return f"all ranks of a vocabulary must be called alike, but they differ in {what}{values}"
        if header.batch != own.batch:
            return (
                "all ranks of a vocabulary must be given the same batch, but labels (or num_items_in_batch) here, on "
                f"rank {rank}, are not those on rank {other}: feed the ranks of a tensor-parallel group the same rows"
            )
    bounds = [(header.start, header.stop) for header in headers]
    starts = [0] + [stop for _, stop in bounds[:-1]]
    if any(start != expected for (start, _), expected in zip(bounds, starts, strict=True)):
        return f"the ranks' shards [start, stop) must follow one another from 0 without gap or overlap, got {bounds}"
    if bounds[-1][1] < own.vocab_size:
        return f"the ranks' shards must cover the vocabulary [0, {own.vocab_size}), got {bounds}"
    mass = sum(header.prior_mass for header in headers)
    if not abs(mass - 1) <= PRIOR_MASS_TOLERANCE:
        negative = " (a number in it is negative or NaN)" if mass != mass else ""
        return f"smoothing_prior must sum to 1 over all ranks' shards, got {mass:.6g}{negative}"
    return None
