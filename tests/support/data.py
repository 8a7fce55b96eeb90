"""Data files prepared as a run does it, in the process of the test."""

import tempfile
from pathlib import Path

from launch.data.encode import Encoder
from launch.data.encode_batch import BatchEncoder
from launch.data.prepare import prepare
from launch.data.prepared import EncodedData, open_prepared
from launch.data.read import sources_of


def prepared(
    source: str | None,
    tokenizer,
    max_length: int = 512,
    strict: bool = False,
    eval_source: str | None = None,
    fraction: float = 0.05,
    **arguments,
) -> EncodedData:
    """Return the rows of a source; `arguments` are those of `prepare`."""
    encoder = BatchEncoder(tokenizer, Encoder(tokenizer, max_length))
    sources = sources_of(None if source is None else [source], eval_source, fraction)
    with tempfile.TemporaryDirectory() as folder:
        prepare(sources, encoder, Path(folder), strict=strict, **arguments)
        return open_prepared(Path(folder))
