"""Packing: every row once and whole, as few sequences as best-fit makes, positions and labels that restart."""

import random
from itertools import pairwise
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from launch.data.batches import PadToLongest
from launch.data.packing import PackedRows, PadPacked, best_fit, row_lengths
from launch.data.rows_file import COLUMNS
from launch.data.splits import heldout_split, training_split

QUICK = settings(max_examples=60, deadline=None)
LENGTHS = st.integers(4, 40).flatmap(
    lambda most: st.tuples(st.lists(st.integers(2, most), min_size=1), st.just(most))
)


def naive(lengths: list[int], most: int) -> list[int]:
    """What best-fit decreasing leaves in each sequence, by looking at all of them for every row."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(most - length)
    return sorted(rooms)


@QUICK
@given(LENGTHS, st.integers(0, 5))
def test_every_row_once_in_the_sequences_of_best_fit(drawn, seed):
    lengths, most = drawn
    plan = best_fit(np.array(lengths), most, seed)
    assert sorted(plan.rows.tolist()) == list(range(len(lengths)))
    assert sorted(most - sum(lengths[row] for row in rows) for rows in plan) == naive(lengths, most)
    firsts = [rows[0] for rows in plan]
    assert firsts == sorted(firsts) and all((np.diff(rows) > 0).all() for rows in plan)
    again = best_fit(np.array(lengths), most, seed)
    assert np.array_equal(plan.rows, again.rows) and np.array_equal(plan.starts, again.starts)


def test_the_seed_decides_which_rows_of_equal_length_go_together():
    plans = [best_fit(np.full(100, 5), 10, seed).rows.tolist() for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


def test_a_row_that_does_not_fit():
    with pytest.raises(ValueError, match="expected rows of at most 8 tokens, got one of 9"):
        best_fit(np.array([3, 9]), 8, seed=0)


def rows_of(lengths: list[int]) -> datasets.Dataset:
    """Rows of different tokens everywhere, all of which are learned but every fifth."""
    ends = np.cumsum([0, *lengths])
    ids = [list(range(10 + start, 10 + stop)) for start, stop in pairwise(ends)]
    labels = [[token if token % 5 else -100 for token in row] for row in ids]
    columns = {"input_ids": ids, "labels": labels, "length": lengths, "where": [f"a:{n}" for n in range(len(ids))]}
    return datasets.Dataset.from_dict(columns, features=COLUMNS)


@QUICK
@given(st.lists(st.integers(2, 12), min_size=1, max_size=30), st.sampled_from([1, 8]))
def test_a_batch_holds_each_row_whole_and_apart(lengths, multiple_of):
    rows = rows_of(lengths)
    packed = PackedRows(rows, best_fit(row_lengths(rows), 24, seed=0), blanks=1, token_id=2)
    batch = PadPacked(PadToLongest(3, multiple_of), cumulative=True)([packed[n] for n in range(len(packed))])
    assert "attention_mask" not in batch and batch["tokens"] == sum(lengths)
    assert batch["label_tokens"] == sum(label != -100 for row in rows["labels"] for label in row[1:])
    assert batch["where"] == [", ".join(f"a:{row}" for row in rows) for rows in packed.plan] + ["blank"]
    bounds = batch["cu_seq_lens_q"].tolist()
    flat = {name: batch[name].flatten().tolist() for name in ("input_ids", "labels", "position_ids")}
    found, padding = {}, []
    for start, stop in pairwise(bounds):
        part = {name: values[start:stop] for name, values in flat.items()}
        assert part["position_ids"] == list(range(stop - start))
        if part["input_ids"][0] in (2, 3):
            padding.append(part)
        else:
            found[part["input_ids"][0]] = (part["input_ids"], part["labels"])
    assert found == {row["input_ids"][0]: (row["input_ids"], [-100, *row["labels"][1:]]) for row in rows}
    assert all(set(part["labels"]) == {-100} and len(set(part["input_ids"])) == 1 for part in padding)
    assert bounds[-1] == batch["input_ids"].numel() and batch["max_length_q"] == max(np.diff(bounds))


def test_a_sequence_is_what_transformers_flattens_its_rows_to():
    rows = rows_of([7, 3, 5, 9])
    packed = PackedRows(rows, best_fit(row_lengths(rows), 24, seed=0), blanks=0, token_id=2)
    batch = PadPacked(PadToLongest(3, multiple_of=1), cumulative=True)([packed[0]])
    chosen = [{name: rows[int(row)][name] for name in ("input_ids", "labels")} for row in packed.plan[0]]
    expected = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(chosen)
    for name, value in expected.items():
        assert (
            torch.equal(batch[name], value) and batch[name].dtype == value.dtype
            if torch.is_tensor(value)
            else (batch[name] == value)
        ), name


def test_labels_of_another_length_are_refused():
    columns = {"input_ids": [[5, 6], [7]], "labels": [[5], [7]], "length": [2, 1], "where": ["a:1", "a:2"]}
    rows = datasets.Dataset.from_dict(columns, features=COLUMNS)
    packed = PackedRows(rows, best_fit(row_lengths(rows), 8, seed=0), blanks=0, token_id=2)
    with pytest.raises(ValueError, match="expected 3 labels"):
        PadPacked(PadToLongest(3))([packed[0]])


@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_an_epoch_takes_each_row_once_and_blanks_last(capsys, strategy):
    lengths = [random.Random(n).randint(2, 20) for n in range(50)]
    args = SimpleNamespace(seed=1, data_seed=None, train_sampling_strategy=strategy, dataloader_drop_last=False)
    split, sampler = training_split(rows_of(lengths), args, 8, 8, 2, packed_length=32)
    assert len(split) % 8 == 0 and len(sampler) == len(split)
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        orders.append([split[index]["where"] for index in sampler])
        where = [name for name in ", ".join(orders[-1]).split(", ") if name != "blank"]
        assert sorted(where) == sorted(f"a:{n}" for n in range(50))
        assert set(orders[-1][len(split.plan) :]) <= {"blank"} and "blank" not in orders[-1][: len(split.plan)]
    assert (orders[0] == orders[1]) == (strategy == "sequential")
    count, said = len(split.plan), capsys.readouterr().out
    assert f"packing: 50 rows in {count} sequences of 32 tokens, {sum(lengths) / count / 32:.1%} filled" in said


def test_held_out_rows_are_packed_too():
    split = heldout_split(rows_of([5, 6, 7, 8, 9]), 4, 2, packed_length=16)
    assert [split[n]["where"] for n in range(len(split))] == ["a:0", "a:1, a:3", "a:2, a:4", "blank"]
    assert len(heldout_split(rows_of([5]).select([]), 4, 2, packed_length=16)) == 0


def test_lengths_of_rows_that_were_chosen():
    rows = rows_of([5, 2, 7])
    assert row_lengths(rows).tolist() == [5, 2, 7] and row_lengths(rows.select([2, 0])).tolist() == [7, 5]
