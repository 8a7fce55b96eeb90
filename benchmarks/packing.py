"""python benchmarks/packing.py: a pass over rows padded as they come, grouped by length, and packed.

Forward and backward of the default recipe's model on rows of its data, in CPU time of one thread, which other
processes of the machine change little. Each way has the same rows, and about as many tokens in a batch.
"""

import argparse
import time

import torch
from torch import Tensor

from launch.config.command_line import parse_options
from launch.data.batches import PadToLongest
from launch.data.load import load_data
from launch.data.packing import PackedRows, PadPacked, best_fit, row_lengths
from launch.data.sampler import grouped_by_length, shuffled
from launch.model.load import load_model
from launch.process.ranks import ensure_environment
from smoothing import install_smoothed_loss

BATCH = 16  # rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max_length", default="256", help="of a row, and of a packed sequence")
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    ensure_environment()
    torch.set_num_threads(1)
    options, _ = parse_options(["--max_length", given.max_length])
    tokenizer, data = load_data(options)
    model = load_model(options, tokenizer, torch.float32, 0).train()
    install_smoothed_loss(model, label_smoothing=options.smoothing)
    draw = torch.Generator().manual_seed(0)
    rows = data.train.select(shuffled(len(data.train))(draw)[: given.rows])
    tokens = int(row_lengths(rows).sum())
    ways = batches(rows, tokenizer, options.max_length, draw)
    for _ in range(given.rounds):
        for name, way in ways.items():
            start = time.process_time()
            for batch in way:
                model(**batch).loss.backward()
                model.zero_grad()
            seconds = time.process_time() - start
            share = tokens / sum(batch["input_ids"].numel() for batch in way)
            print(f"{name}: {share:.0%} of positions hold a token, {tokens / seconds:,.0f} tokens per CPU second")


def batches(rows, tokenizer, max_length: int, draw: torch.Generator) -> dict[str, list[dict[str, Tensor | int]]]:
    """The batches of each way, as the model gets them."""
    lengths, pad = row_lengths(rows), PadToLongest(tokenizer.pad_token_id)
    packed = PackedRows(rows, best_fit(lengths, max_length, seed=0), 0, tokenizer.eos_token_id)
    sequences = max(1, round(BATCH * lengths.mean() / max_length))
    orders = {
        "as they come": (shuffled(len(rows))(draw), rows, BATCH, pad),
        "by length": (grouped_by_length(lengths.tolist(), BATCH)(draw), rows, BATCH, pad),
        "packed": (range(len(packed)), packed, sequences, PadPacked(pad)),
    }
    made = {}
    for name, (order, source, size, collate) in orders.items():
        parts = [
            [source[int(index)] for index in order[start : start + size]] for start in range(0, len(order), size)
        ]
        made[name] = [seen_by_model(collate(part)) for part in parts]
    return made


def seen_by_model(batch: dict) -> dict[str, Tensor | int]:
    return {name: value for name, value in batch.items() if name not in ("where", "tokens", "attention_mask")}


if __name__ == "__main__":
    main()
