"""Epochs in which each source has a share of the rows that is not its own size (`--data_weights`)."""

from collections.abc import Callable, Sequence

import torch

from launch.data.sampler import Order


def rows_of_sources(weights: Sequence[float], count: int) -> list[int]:
    """Return how many of `count` rows each source gives: its share, rounded so that they add up.

    A source's number is off its share by less than one row (the largest remainders are rounded up).
    """
    largest = max(weights)  # so that no sum is infinite
    parts = [weight / largest for weight in weights]
    shares = [count * part / sum(parts) for part in parts]
    rows = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda source: rows[source] - shares[source])
    for source in by_remainder[: count - sum(rows)]:
        rows[source] += 1
    return rows


def weighted(
    sources: Sequence[range], weights: Sequence[float], seed: int, arrange: Callable[[list[int]], Order]
) -> Order:
    """Rows by weight: an epoch has as many as all sources together, and of each source its share.

    Each source is passed through again and again, in a new random order each time; an epoch goes on where the last
    one stopped. So no row of a source comes twice before all of its rows have come as often, however small its share.

    Args:
        sources: The rows of each source.
        weights: The weight of each source; only their ratios matter.
        seed: Seed of the sampler, which an epoch's generator has been seeded with after adding the epoch.
        arrange: Puts an epoch's rows in order.
    """
    counts = rows_of_sources(weights, sum(map(len, sources)))

    def order(generator: torch.Generator) -> list[int]:
        epoch = generator.initial_seed() - seed
        chosen = [
            row
            for number, (source, count) in enumerate(zip(sources, counts, strict=True))
            for row in _walk(source, epoch * count, count, seed + number)
        ]
        return [chosen[place] for place in arrange(chosen)(generator)]

    return order


def describe_epoch(names: Sequence[str], sources: Sequence[range], weights: Sequence[float]) -> list[str]:
    """Return what an epoch has of each source, for the log."""
    total = sum(map(len, sources))
    lines = [f"an epoch is {total:,} rows, by --data_weights:"]
    for name, source, count in zip(names, sources, rows_of_sources(weights, total), strict=True):
        lines.append(f"  {count:,} of {name}, which has {len(source):,}: each row {count / len(source):.3g} times")
    return lines


def _walk(source: range, start: int, count: int, seed: int) -> list[int]:
    """Return `count` rows from place `start` on of endless passes through a source, each in its own random order."""
    rows: list[int] = []
    while len(rows) < count:
        number, place = divmod(start + len(rows), len(source))
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        drawn = torch.randperm(len(source), generator=generator)[place : place + count - len(rows)]
        rows += [source[index] for index in drawn.tolist()]
    return rows
