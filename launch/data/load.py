"""The data of a run: from its options to a tokenizer and two encoded splits, with a printed summary."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
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
from launch.data.records import DataError, DropReport
from launch.data.sources.files import pinned
from launch.data.stream import Stream
from launch.data.streamed_rows import Streaming
from launch.data.tokenizer import describe_tokenizer, load_tokenizer, train_once
from launch.data.weights import describe_epoch, rows_of_sources
from launch.process.once import once_a_machine
from launch.process.ranks import say

FIRST_ROWS = 2000  # of each source that is streamed: prepared, so that the log can tell what the rows are like
STREAMING_WORKERS = 2  # of a rank: fewer would never encode while the rank trains


def load_data(
    options: SftOptions,
    day: date | None = None,
    sources: Sources | None = None,
    purpose: str = "to train on",
) -> tuple[PreTrainedTokenizerBase, EncodedData]:
    """Load the tokenizer and the encoded rows; print what was found and dropped, and one row with its label mask.

    The rows are prepared on the first rank of each machine, unless an earlier run has done so. `day` is the date that
    a chat template is told: the day on which the run was first started, so that a resumed run has the same rows.
    `sources` are read in the place of those that the options name. `purpose`: what the log says of the rows.

    Collectives: those of `once_a_machine`.
    """
    sources = sources or run_sources(options)
    if options.streaming:
        options = replace(options, max_rows=FIRST_ROWS)
    paths = json.loads(once_a_machine(lambda: json.dumps(_prepare(options, sources, day)), "preparing the data"))
    tokenizer = load_tokenizer(options, Path(paths["pieces"]) if paths["pieces"] else None)
    data = open_prepared(Path(paths["rows"]), options.data_weights)
    if options.streaming:
        sources = run_sources(replace(options, data=paths["streamed"]))
        encoder = make_encoder(options, tokenizer, date.fromisoformat(paths["day"]))
        data = replace(data, streaming=make_streaming(options, sources, data, encoder, paths["sources"]))
        say(f"data: streamed, and never prepared as a whole; what follows tells its first {FIRST_ROWS:,} rows")
    check(data, options)
    describe(data, options, paths["found"], purpose)
    say(describe_example(data.train[0], tokenizer))
    return tokenizer, data


def run_sources(options: SftOptions) -> Sources:
    """Return the sources that a run's flags name."""
    return sources_of(options.data, options.eval_data, options.eval_fraction, options.streaming)


def make_encoder(options: SftOptions, tokenizer, day: date | None = None) -> BatchEncoder:
    """Return what makes rows of a run's records."""
    assert not isinstance(options.chat_template_kwargs, str)  # parsed by now
    pairs_as_chat = options.chat_template != NONE
    encode = Encoder(tokenizer, options.max_length, options.chat_template_kwargs, day, pairs_as_chat)
    return BatchEncoder(tokenizer, encode, Columns(column_names(options.columns)))


def _prepare(options: SftOptions, sources: Sources, day: date | None) -> dict:
    """Return where the rows are, and the pieces of a tokenizer that was trained for them."""
    cache = Cache(options.data_cache)
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
        "max_rows": options.max_rows,
        "versions": [library.__version__ for library in (tokenizers, transformers, jinja2)],
    }

    def make(folder: Path) -> None:
        workers = len(os.sched_getaffinity(0)) if options.data_workers is None else options.data_workers
        why = "--streaming: the others are read while it trains" if options.streaming else "--max_rows"
        prepare(sources, encoder, folder, workers, options.strict, options.max_rows, why)

    rows, found = cache.find_or_make(fingerprint(facts), damage, make)
    return {
        "rows": str(rows),
        "found": found,
        "pieces": pieces and str(pieces),
        "day": day.isoformat(),
        "streamed": [*map(pinned, options.data or [])] if options.streaming else [],
        "sources": fingerprint({"sources": facts["sources"]}),
    }


def make_streaming(
    options: SftOptions, sources: Sources, first: EncodedData, encoder: BatchEncoder, fingerprint: str
) -> Streaming:
    """Return what rows are streamed from; `first` are the first rows, of which some may be held out."""
    left_out = frozenset() if sources.heldout else frozenset(first.heldout["where"])
    return Streaming(
        stream=Stream(sources.train, encoder.example_of, options.shuffle_buffer, left_out),
        encoder=encoder,
        workers=STREAMING_WORKERS if options.data_workers is None else options.data_workers,
        strict=options.strict,
        fingerprint=fingerprint,
        told=tuple(first.report.left_out),
    )


def check(data: EncodedData, options: SftOptions) -> None:
    """Raise DataError if more rows were dropped than the flags accept, or a source with a weight has none."""
    report = data.report
    if options.strict and report.rejections:
        DropReport().reject(report.rejections[0], strict=True)
    dropped, rows = report.dropped(), len(data.train) + len(data.heldout)
    if dropped > options.max_dropped * (dropped + rows):
        raise DataError(
            f"{dropped:,} of {dropped + rows:,} rows cannot be used, more than a share of --max_dropped "
            f"{options.max_dropped:g}; fix the rows named here, or raise it.\n{report.summary()}"
        )
    if options.data_weights:
        names = [name for name, _ in data.summary.sources]
        counts = rows_of_sources(options.data_weights, sum(map(len, data.sources)))
        for name, rows_of_one, count in zip(names, data.sources, counts, strict=True):
            if not rows_of_one:
                raise DataError(f"{name} has no rows to train on, so it can have no weight (--data_weights).")
            if not count:
                raise DataError(
                    f"{name} has so small a weight that no row of it is in an epoch of "
                    f"{sum(map(len, data.sources)):,} rows; raise it (--data_weights), or leave {name} out."
                )


def describe(data: EncodedData, options: SftOptions, found: bool, purpose: str) -> None:
    """Print what rows there are, and what was dropped."""
    summary = data.summary
    heldout = f"{len(data.heldout):,} held out, " if options.eval_data or options.eval_fraction else ""
    say(
        f"data: {counted(len(data.train), 'row')} {purpose}, {heldout}format "
        f"{describe_formats(summary.formats)}" + (f"; from the cache, prepared {summary.prepared}" if found else "")
    )
    report = summary.report
    too_long = sum("max_length" in rejected.reason for rejected in report.rejections)
    notes = [
        f"{summary.statistics.describe()}; --max_length {options.max_length} dropped {too_long:,} rows and shortened "
        f"{len(report.truncated):,}"
    ]
    names = [name for name, _ in summary.sources]
    if options.data_weights:
        notes += describe_epoch(names, data.sources, options.data_weights)
    elif len(names) > 1:
        notes += [f"{len(rows):,} rows of {name}" for name, rows in zip(names, data.sources, strict=True)]
    evaluated = options.eval_data
    if evaluated and not os.path.isdir(evaluated) and _place(evaluated) in map(_place, options.data or []):
        notes.append(f"--eval_data {evaluated} is trained on too: eval_nll does not tell how other rows would do")
    for note in [*notes, *report.summary().splitlines()]:
        say(f"  {note}")


def _place(source: str) -> str:
    return os.path.realpath(source) if os.path.exists(source) else source


def describe_formats(formats: Mapping[str, int]) -> str:
    if len(formats) == 1:
        return next(iter(formats))
    return "mixed: " + ", ".join(f"{format} ({counted(count, 'row')})" for format, count in formats.items())
