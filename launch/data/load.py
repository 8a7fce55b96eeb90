"""The data of a run: from its options to a tokenizer and two encoded splits, with a printed summary."""

import json
import os
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import jinja2
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from launch.common.messages import counted
from launch.config.chat_template import NONE
from launch.config.columns import column_names
from launch.config.options import SftOptions
from launch.data.cache import Cache, fingerprint
from launch.data.encode import Encoder
from launch.data.encode_batch import BatchEncoder
from launch.data.examples.columns import Columns
from launch.data.prepare import prepare
from launch.data.prepared import EncodedData, damage, open_prepared
from launch.data.preview.describe import describe_example
from launch.data.read import Sources, sources_of
from launch.data.records import DropReport
from launch.data.tokenizer import describe_tokenizer, load_tokenizer, train_once
from launch.process.once import once_a_machine
from launch.process.ranks import say


def load_data(options: SftOptions, day: date | None = None) -> tuple[PreTrainedTokenizerBase, EncodedData]:
    """Load the tokenizer and the encoded rows; print what was found and dropped, and one row with its label mask.

    The rows are prepared on the first rank of each machine, unless an earlier run has done so. `day` is the date that
    a chat template is told: the day on which the run was first started, so that a resumed run has the same rows.

    Collectives: those of `once_a_machine`.
    """
    sources = run_sources(options)
    paths = json.loads(once_a_machine(lambda: json.dumps(_prepare(options, sources, day)), "preparing the data"))
    tokenizer = load_tokenizer(options, Path(paths["pieces"]) if paths["pieces"] else None)
    data = open_prepared(Path(paths["rows"]))
    if options.strict:
        for rejected in data.report.rejections:
            DropReport().reject(rejected, strict=True)
    describe(data, paths["found"])
    say(describe_example(data.train[0], tokenizer))
    return tokenizer, data


def run_sources(options: SftOptions) -> Sources:
    """Return the sources that a run's flags name."""
    return sources_of(options.data, options.eval_data, options.eval_fraction)


def make_encoder(options: SftOptions, tokenizer, day: date | None = None) -> BatchEncoder:
    """Return what makes rows of a run's records."""
    assert not isinstance(options.chat_template_kwargs, str)  # parsed by now
    pairs_as_chat = options.chat_template != NONE
    encode = Encoder(tokenizer, options.max_length, options.chat_template_kwargs, day, pairs_as_chat)
    return BatchEncoder(tokenizer, encode, Columns(column_names(options.columns)))


def _prepare(options: SftOptions, sources: Sources, day: date | None) -> dict:
    """Return where the rows are, and the pieces of a tokenizer that was trained for them."""
    cache = Cache(None)
    pieces = train_once(options, cache, sources.train) if options.model is None else None
    tokenizer = load_tokenizer(options, pieces)
    day = day or date.today()
    encoder = make_encoder(options, tokenizer, day)
    facts = {
        "sources": sources.fingerprints(),
        "tokenizer": describe_tokenizer(tokenizer),
        "columns": encoder.columns.renamed,
        "chat template": [options.chat_template_kwargs, options.chat_template != NONE],
        "max_length": options.max_length,
        "day": day.isoformat() if encoder.encode.template.dated else None,
        "versions": [library.__version__ for library in (tokenizers, transformers, jinja2)],
    }

    def make(folder: Path) -> None:
        prepare(sources, encoder, folder, len(os.sched_getaffinity(0)), options.strict)

    rows, found = cache.find_or_make(fingerprint(facts), damage, make)
    return {"rows": str(rows), "found": found, "pieces": pieces and str(pieces)}


def describe(data: EncodedData, found: bool) -> None:
    """Print what there is to train on, and what was dropped."""
    summary = data.summary
    say(
        f"data: {counted(len(data.train), 'row')} to train on, {len(data.heldout):,} held out, format "
        f"{describe_formats(summary.formats)}" + (f"; from the cache, prepared {summary.prepared}" if found else "")
    )
    for note in [summary.statistics.describe(), *summary.report.summary().splitlines()]:
        say(f"  {note}")


def describe_formats(formats: Mapping[str, int]) -> str:
    if len(formats) == 1:
        return next(iter(formats))
    return "mixed: " + ", ".join(f"{format} ({counted(count, 'row')})" for format, count in formats.items())
