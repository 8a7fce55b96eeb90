"""Both splits as Trainer reads them: packed or not, with blank rows at their end, and in which order."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import datasets

from launch.config.training_arguments import SftTrainingArguments
from launch.data.blank_rows import fill_to_multiple
from launch.data.packing import PackedRows, best_fit, row_lengths
from launch.data.sampler import EpochSampler, Order, grouped_by_length, in_order, shuffled
from launch.data.streamed_rows import Share, StreamedRows, Streaming
from launch.data.weights import weighted
from launch.process.ranks import say

Split: TypeAlias = datasets.Dataset | PackedRows | StreamedRows


def training_split(
    rows: datasets.Dataset,
    args: SftTrainingArguments,
    rows_a_step: int,
    multiple: int,
    token_id: int,
    packed_length: int | None,
    sources: Sequence[range] = (),
    weights: Sequence[float] | None = None,
) -> tuple[Split, EpochSampler]:
    """Return the rows to train on, with blank rows at their end, and the order in which an epoch takes them.

    Each row is taken once an epoch, in the same step whatever the number of ranks. With --dataloader_drop_last the
    rows that would not fill an epoch's last step are left out, and no blank rows are needed.

    Args:
        rows: The training rows.
        args: Seed, strategy of sampling, and whether the last rows are dropped.
        rows_a_step: How many rows, or packed sequences, make a step on all ranks.
        multiple: How many the ranks take at a time, a micro-batch each.
        token_id: What blank rows hold.
        packed_length: The tokens of a packed sequence; None for rows as they are.
        sources: The rows of each source, for `weights`.
        weights: The share of each source in the rows of an epoch; without them each row is taken once.
    """
    seed = _seed(args)
    multiple = 1 if args.dataloader_drop_last else multiple
    if packed_length is None:
        split: Split = fill_to_multiple(rows, multiple, token_id)
        count = len(rows)
    else:
        split, count = _packed(rows, packed_length, multiple, token_id, seed)

    def arrange(taken: Sequence[int]) -> Order:
        if args.train_sampling_strategy == "group_by_length":
            lengths = row_lengths(rows)
            return grouped_by_length([int(lengths[row]) for row in taken], rows_a_step)
        return in_order(len(taken)) if args.train_sampling_strategy == "sequential" else shuffled(len(taken))

    order = weighted(sources, weights, seed, arrange) if weights else arrange(range(count))
    kept = count - count % rows_a_step if args.dataloader_drop_last else count
    return split, EpochSampler(order, kept, range(count, len(split)), seed)


def streamed_split(
    streaming: Streaming,
    args: SftTrainingArguments,
    share: Share,
    rows_a_step: int,
    token_id: int,
    beat: Callable[[], None],
) -> tuple[StreamedRows, EpochSampler]:
    """Return the rows of all steps as one epoch, and a sampler that takes them as they come; see `StreamedRows`."""
    seed, count = _seed(args), args.max_steps * rows_a_step
    rows = StreamedRows(streaming, share, seed, count, token_id, beat)
    return rows, EpochSampler(in_order(count), count, range(count, count), seed)


def _seed(args: SftTrainingArguments) -> int:
    return args.seed if args.data_seed is None else args.data_seed


def heldout_split(rows: datasets.Dataset, multiple: int, token_id: int, packed_length: int | None) -> Split:
    """Return the held-out rows, with blank rows up to a multiple of what the ranks take at a time."""
    if packed_length is None or not len(rows):
        return fill_to_multiple(rows, multiple, token_id)
    return _packed(rows, packed_length, multiple, token_id, seed=0)[0]


def _packed(rows: datasets.Dataset, length: int, multiple: int, token_id: int, seed: int) -> tuple[PackedRows, int]:
    lengths = row_lengths(rows)
    plan = best_fit(lengths, length, seed)
    fill = lengths.sum(dtype=int) / (len(plan) * length)
    say(f"packing: {len(rows):,} rows in {len(plan):,} sequences of {length:,} tokens, {fill:.1%} filled")
    return PackedRows(rows, plan, -len(plan) % multiple, token_id), len(plan)
