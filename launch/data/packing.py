"""Several rows to a sequence: which rows go together, what such a sequence holds, and how sequences become a batch.

A model of transformers keeps the rows of a sequence apart by their positions, which restart at every row, if it gets
no attention mask; `launch.model.packed_rows` checks that it does.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch.utils.data import Dataset

from launch.data.batches import PadToLongest
from launch.data.blank_rows import BLANK
from launch.data.examples.rows import IGNORED


@dataclass(frozen=True)
class Plan:
    """Which rows go into which sequence: sequence i takes `rows[starts[i] : starts[i + 1]]`."""

    rows: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.rows[self.starts[index] : self.starts[index + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self)))


def best_fit(lengths: np.ndarray, max_length: int, seed: int) -> Plan:
    """Put rows into sequences of at most `max_length` tokens: the longest first, each where least room is left.

    Rows of equal length come in an order drawn from `seed`, so that neighbours of the data are not always together.
    Sequences stand in the order of their first rows. Raises ValueError for a row longer than `max_length`.
    """
    if len(lengths) and lengths.max() > max_length:
        raise ValueError(f"expected rows of at most {max_length} tokens, got one of {lengths.max()}")
    drawn = np.random.default_rng(seed).permutation(len(lengths))
    longest_first = drawn[np.argsort(-lengths[drawn], kind="stable")]
    sequence_of = np.empty(len(lengths), dtype=np.int64)
    rooms: list[int] = []  # that sequences have left, each once, ascending
    sequences: dict[int, list[int]] = {}  # by the room that they have left
    count = 0
    for row, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        position = bisect_left(rooms, length)
        if position == len(rooms):
            sequence, room = count, max_length
            count += 1
        else:
            room = rooms[position]
            sequence = sequences[room].pop()
            if not sequences[room]:
                del rooms[position], sequences[room]
        sequence_of[row] = sequence
        left = room - length
        if left not in sequences:
            insort(rooms, left)
            sequences[left] = []
        sequences[left].append(sequence)
    return _in_order_of_first_rows(sequence_of, count)


def _in_order_of_first_rows(sequence_of: np.ndarray, count: int) -> Plan:
    rows = np.argsort(sequence_of, kind="stable")  # ascending in each sequence
    sizes = np.bincount(sequence_of, minlength=count)
    firsts = rows[np.cumsum(sizes) - sizes]
    order = np.argsort(firsts)
    place = np.empty(count, dtype=np.int64)
    place[order] = np.arange(count)
    return Plan(np.argsort(place[sequence_of], kind="stable"), np.concatenate([[0], np.cumsum(sizes[order])]))


def row_lengths(rows: datasets.Dataset) -> np.ndarray:
    """Return the number of tokens of each row; no tokens are read."""
    return rows.select_columns("length").with_format("arrow")[:]["length"].to_numpy()


class PackedRows(Dataset):
    """The sequences of a plan, each read when it is asked for; then `blanks` sequences of one blank row.

    A sequence has `input_ids` and `labels` of its rows, their `lengths`, and in `where` that of all of them. The
    first label of each row is ignored, since nothing of its own row precedes it.
    """

    def __init__(self, rows: datasets.Dataset, plan: Plan, blanks: int, token_id: int):
        self.rows = rows.select_columns(["input_ids", "labels", "where"]).with_format("arrow")
        self.plan, self.blanks, self.token_id = plan, blanks, token_id

    def __len__(self) -> int:
        return len(self.plan) + self.blanks

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self.plan):
            blank = {"input_ids": [self.token_id] * 2, "labels": [IGNORED] * 2}
            return blank | {"lengths": [2], "where": BLANK}
        table = self.rows[self.plan[index].tolist()]
        lengths = pc.list_value_length(table["input_ids"]).to_pylist()
        ids, labels = (np.array(table[name].combine_chunks().flatten()) for name in ("input_ids", "labels"))
        if len(labels) == len(ids):  # else the collator refuses it
            labels[list(accumulate(lengths[:-1], initial=0))] = IGNORED
        return {
            "input_ids": ids,
            "labels": labels,
            "lengths": lengths,
            "where": ", ".join(table["where"].to_pylist()),
        }


@dataclass(frozen=True)
class PadPacked:
    """Pads packed sequences as `PadToLongest` does; `position_ids` that restart in place of an attention mask.

    Padding is a row of its own. With `cumulative` also the bounds of the rows as transformers' flash attention takes
    them: without, it keeps rows apart only in a batch of one sequence.
    """

    pad: PadToLongest
    cumulative: bool = False

    def __call__(self, sequences: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.pad(sequences)
        del batch["attention_mask"]
        width = batch["input_ids"].shape[1]
        lengths = [[*sequence["lengths"], width - sum(sequence["lengths"])] for sequence in sequences]
        positions = [torch.cat([torch.arange(length) for length in row]) for row in lengths]
        batch["position_ids"] = torch.stack(positions)
        if self.cumulative:
            flat = [length for length in chain.from_iterable(lengths) if length]
            bounds = torch.tensor([0, *accumulate(flat)], dtype=torch.int32)
            batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            batch |= {"max_length_q": max(flat), "max_length_k": max(flat)}
        return batch
