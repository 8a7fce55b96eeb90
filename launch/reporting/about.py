"""What a run knows when it starts and a report tells later: its environment, and a few of the rows it learns from."""

import json
import os
import platform
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from launch.common.atomic_files import write_whole
from launch.common.paths import ABOUT
from launch.data.prepared import EncodedData
from launch.data.preview.choose import choose
from launch.data.preview.decoded import decoded
from launch.data.preview.pieces import Kind, Piece, Token, pieces_of
from launch.data.preview.shown import ShownRow, tokens_of
from launch.process.device import uses_gpu
from launch.process.ranks import world_size

ROWS = 4
MOST_PIECES = 1200  # shown of a row
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "datasets", "peft", "triton")


def write_about(run: Path, data: EncodedData, tokenizer: Any, seed: int) -> None:
    """Write `about.json`. Raises `OSError`."""
    chosen = choose(data, ROWS, seed).drawn
    rows = [data.train[index] for index in chosen]
    about = {
        "environment": environment(),
        "data": data_facts(data),
        "rows": [_written(row, tokenizer) for row in rows],
    }
    write_whole(run / ABOUT, json.dumps(about) + "\n")


def environment() -> dict[str, str]:
    """Return what the figures of a run depend on besides its configuration, by name."""
    found = {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "processes": str(world_size()),
        "cores": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "Python": platform.python_version(),
    }
    if uses_gpu():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["GPU"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {torch.cuda.device_count()} on this machine"
        found["CUDA"] = str(torch.version.cuda)
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def data_facts(data: EncodedData) -> dict[str, str]:
    """Return the numbers of the rows that are learned from, by name."""
    statistics = data.summary.statistics
    first = " (the first ones of a stream)" if data.streaming is not None else ""
    return {
        "rows to train on": f"{len(data.train):,}{first}",
        "rows held out": f"{len(data.heldout):,}",
        "median length": f"{statistics.median:,} tokens",
        "longest": f"{statistics.longest:,} tokens",
        "learned": f"{statistics.learned / statistics.tokens:.0%} of {statistics.tokens:,} tokens",
        "shortened to fit": f"{len(data.report.truncated):,} rows",
    }


def shown_row(row: dict[str, Any]) -> ShownRow:
    """Return a row of `about.json` as a preview shows it. Raises what an object of another shape does."""
    pieces, position = [], 0
    for kind, text, tokens in row["pieces"]:
        own = []
        for token, name, special in tokens:
            own.append(Token(position, token, name, special))
            position += 1
        pieces.append(Piece(Kind(kind), text, tuple(own)))
    notes = []
    if len(pieces) > MOST_PIECES:
        half = MOST_PIECES // 2
        notes = [f"{len(pieces) - MOST_PIECES:,} pieces in the middle of this row are left out here"]
        pieces = [*pieces[:half], Piece(Kind.READ, " … "), *pieces[-half:]]
    return ShownRow(row["where"], pieces, row["input_ids"], row["labels"], notes=notes)


def _written(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A row with its pieces, from its tokens alone: each with its kind, its text, and its tokens."""
    ids = list(row["input_ids"])
    pieces = pieces_of(tokens_of(ids, tokenizer), row["labels"], *decoded(ids, tokenizer))
    texts = [[p.kind, p.text, [[t.id, t.name, t.special] for t in p.tokens]] for p in pieces]
    return {"where": row["where"], "input_ids": ids, "labels": list(row["labels"]), "pieces": texts}
