"""Ranks that share a vocabulary find out together whether they agree, and fail together.

Where there are several, each loss sends a header of a few int64 (`Header`): a rank whose arguments are wrong still
takes part, and every other rank learns of it in the very collective that it would otherwise have waited in.

The loss from logits sends the header in front of its statistics, in the same all-gather. The first time that a shard
is used the header is exchanged once more, alone and before anything else: only then can ranks find out that their
numbers of tokens differ (afterwards such a call ends in an error of the collectives' backend). The fused head, whose
statistics travel in chunks, always sends the header alone and first, while it sums up `w̄`: that is its handshake.

On the CPU headers are read in every call. On a device that would be a host synchronisation a step, so they are read
the first time a shard is used; later they are compared there and `torch._assert_async` ends the step if they differ.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smoothing.core.collectives import all_gather, start_all_gather
from smoothing.shard import VocabShard

MIXERS = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # of splitmix64
PRIOR_MASS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Header:
    """What a rank sends of its call, 8 bytes a field. `refused`: its own arguments are wrong, and it raises.

    From `vocab_size` to `label_smoothing`, the fields must be alike on all ranks.
    """

    refused: bool
    start: int
    stop: int
    vocab_size: int
    tokens: int
    digest: int  # of the other arguments
    batch_checksum: int
    label_smoothing: float
    prior_mass: float

    @classmethod
    def refusal(cls) -> "Header":
        """Return the header of a rank that is about to raise, whatever it was given."""
        return cls(True, 0, 0, 0, 0, 0, 0, 0.0, 0.0)

    def encode(self) -> Tensor:
        """Return the fields as `[HEADER_FIELDS]` int64; floats as their bits, to travel among integers."""
        values = (getattr(self, name) for name in HEADER_TYPES)
        return torch.tensor([_bits(value) for value in values], dtype=torch.int64)

    @classmethod
    def decode_all(cls, headers_RH: Tensor) -> list["Header"]:
        """Return all ranks' headers, read on the host; for a tensor on a device the host waits."""
        types = HEADER_TYPES.values()
        rows: list[list[Any]] = [list(map(_from_bits, row, types)) for row in headers_RH.tolist()]
        return [cls(*row) for row in rows]


HEADER_TYPES: dict[str, type] = {field.name: field.type for field in fields(Header) if isinstance(field.type, type)}
HEADER_FIELDS = len(HEADER_TYPES)
OFFSET = {name: offset for offset, name in enumerate(HEADER_TYPES)}
CHECKSUMS = ("digest", "batch_checksum")
ALIKE = slice(OFFSET["vocab_size"], OFFSET["label_smoothing"] + 1)


def _bits(value: float) -> int:
    if isinstance(value, float):
        (value,) = struct.unpack("<q", struct.pack("<d", value))
    return int(value)


def _from_bits(bits: int, kind: type) -> bool | int | float:
    if kind is float:
        (number,) = struct.unpack("<d", struct.pack("<q", bits))
        return float(number)
    return bool(bits) if kind is bool else bits


def batch_checksum(target_T: Tensor, num_items_in_batch: int | Tensor | None) -> Tensor:
    """Return a number that tells batches apart: of the labels in their positions, and of the loss's divisor.

    Probabilities differ from rank to rank, as their columns do, and are left out.

    Args:
        target_T: labels, `[T]` int64, or probabilities, `[T, S]` floating point.
        num_items_in_batch: one number, or None.

    Returns:
        `[]` int64 on the target's device, without a synchronisation.
    """
    total = torch.zeros((), dtype=torch.int64, device=target_T.device)
    if not target_T.is_floating_point():
        positions_T = torch.arange(len(target_T), device=target_T.device)
        mixed_T = (target_T + positions_T * MIXERS[0]) * MIXERS[1]
        for mixer in MIXERS[1:]:  # not linear, so that labels which change places do not cancel out
            mixed_T = (mixed_T ^ (mixed_T >> 31)) * mixer
        total = mixed_T.sum()
    if num_items_in_batch is None:
        return total
    if isinstance(num_items_in_batch, Tensor):
        return total + num_items_in_batch.reshape(()).to(total.device, torch.int64)
    return total + int(num_items_in_batch)


class Handshake(NamedTuple):
    """What ranks that agree know of one another."""

    headers_RH: Tensor | None  # [R, HEADER_FIELDS]; None for one rank
    widest: int  # columns of the largest shard, on the host


def shake_hands_once(header_H: Tensor, shard: VocabShard) -> None:
    """Exchange the headers alone, the first time that this shard is used: keep a shard, and it is done once.

    Raises:
        ValueError: on every rank, if any rank refused its arguments or the ranks do not agree.

    Collectives: one all-gather of a header, once for each `VocabShard`. Remembering bounds instead would part the
    ranks when a vocabulary is cut anew and some of them keep theirs.
    """
    if shard.widest is None:
        shard.agree(_widest(Header.decode_all(all_gather(header_H, shard)), shard.rank))


def start_handshake(header_H: Tensor, shard: VocabShard) -> Callable[[], Handshake]:
    """Send the header alone, whatever was agreed on before. Calling what is returned ends the handshake.

    That call raises `ValueError` on every rank if any rank refused its arguments or the ranks do not agree. On a
    device only the first handshake of a shard reads the headers on the host: later ones assert there.

    Collectives: one all-gather of a header.
    """
    wait = start_all_gather(header_H, shard)
    known = shard.widest

    def end_handshake() -> Handshake:
        headers_RH = wait()
        if known is not None and headers_RH.device.type != "cpu":
            check(headers_RH, shard.rank)
            return Handshake(headers_RH, known)
        widest = _widest(Header.decode_all(headers_RH), shard.rank)
        shard.agree(widest)
        return Handshake(headers_RH, widest)

    return end_handshake


def exchange(stats_FT: Tensor, header_H: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Give every rank the statistics of all.

    Args:
        stats_FT: this rank's statistics, fp32 or fp64.
        header_H: its header, int64.
        shard: whose group takes part.

    Returns:
        `stats_RFT`, and the headers `[R, HEADER_FIELDS]` that came with them.

    Collectives:
        One all-gather of header and statistics.
    """
    message = torch.cat([header_H.view(stats_FT.dtype), stats_FT.flatten()])
    messages_R = all_gather(message, shard)
    width = message.numel() - stats_FT.numel()
    headers_RH = messages_R[:, :width].contiguous().view(torch.int64)
    return messages_R[:, width:].unflatten(1, stats_FT.shape), headers_RH  # type: ignore[no-untyped-call]  # torch has no types for it


def starts(headers_RH: Tensor) -> Tensor:
    """Return the first column of each rank's shard, `[R]` int64."""
    return headers_RH[:, OFFSET["start"]].contiguous()


def prior_masses(headers_RH: Tensor) -> Tensor:
    """Return the prior mass of each rank's shard, `[R]` fp64."""
    return headers_RH[:, OFFSET["prior_mass"]].contiguous().view(torch.float64)


def check(headers_RH: Tensor, rank: int) -> None:
    """Raise if the ranks do not agree: `ValueError` on the CPU, a device-side assertion on a device."""
    if headers_RH.device.type == "cpu":
        raise_disagreement(Header.decode_all(headers_RH), rank)
    else:
        alike = (headers_RH[:, ALIKE] == headers_RH[rank, ALIKE]).all()
        whole = (prior_masses(headers_RH).sum() - 1).abs() <= PRIOR_MASS_TOLERANCE
        torch._assert_async((headers_RH[:, OFFSET["refused"]] == 0).all() & alike & whole)


def raise_disagreement(headers: list[Header], rank: int) -> None:
    """Raise the `ValueError` that `disagreement` words, if it finds one."""
    if problem := disagreement(headers, rank):
        raise ValueError(problem)


def disagreement(headers: list[Header], rank: int) -> str | None:
    """Return what keeps these ranks from computing one loss, as seen from `rank`; None if nothing does."""
    refused = [other for other, header in enumerate(headers) if header.refused]
    if refused:
        named = f"rank{'s' if len(refused) > 1 else ''} {', '.join(map(str, refused))}"
        return f"{named} of this vocabulary's group refused the arguments and raised; see the error there"
    for other in range(len(headers)):
        if problem := _difference(headers, rank, other):
            return problem
    return _shards_problem(headers) or _prior_problem(headers)


def _difference(headers: list[Header], rank: int, other: int) -> str | None:
    """How the headers of two ranks differ where they must be alike."""
    # checksums last: where another field differs too, its name says more
    for name in sorted(list(HEADER_TYPES)[ALIKE], key=CHECKSUMS.__contains__):
        here, there = getattr(headers[rank], name), getattr(headers[other], name)
        if here == there:
            continue
        if name == "batch_checksum":
            return (
                "all ranks of a vocabulary must be given the same batch, but labels (or num_items_in_batch) here, on "
                f"rank {rank}, are not those on rank {other}: feed the ranks of a tensor-parallel group the same rows"
            )
        what = f"{name}: {here} here (rank {rank}), {there} on rank {other}"
        if name == "digest":
            what = f"another argument (ignore_index, reduction, ..., dtype), here on rank {rank} and on rank {other}"
        return f"all ranks of a vocabulary must pass the same arguments, but they differ in {what}"
    return None


def _shards_problem(headers: list[Header]) -> str | None:
    bounds = [(header.start, header.stop) for header in headers]
    starts = [0] + [stop for _, stop in bounds[:-1]]
    if any(start != expected for (start, _), expected in zip(bounds, starts, strict=True)):
        return f"the ranks' shards [start, stop) must follow one another from 0 without gap or overlap, got {bounds}"
    if bounds[-1][1] < headers[0].vocab_size:
        return f"the ranks' shards must cover the vocabulary [0, {headers[0].vocab_size}), got {bounds}"
    return None


def _prior_problem(headers: list[Header]) -> str | None:
    mass = sum(header.prior_mass for header in headers)
    if abs(mass - 1) <= PRIOR_MASS_TOLERANCE:
        return None
    negative = " (a number in it is negative or NaN)" if mass != mass else ""
    return f"smoothing_prior must sum to 1 over all ranks' shards, got {mass:.6g}{negative}"


def _widest(headers: list[Header], rank: int) -> int:
    """Columns of the largest shard, of ranks that agree; raises `ValueError` if they do not."""
    raise_disagreement(headers, rank)
    return max(header.stop - header.start for header in headers)
