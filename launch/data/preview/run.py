"""`--preview N`: prepare the data, write what is learned of it, and stop before a model is loaded."""

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from launch.common.paths import PREVIEW, RUNS
from launch.config.options import SftOptions
from launch.config.training_arguments import SftTrainingArguments
from launch.data.load import check, load_data, make_encoder, run_sources
from launch.data.preview.write import write_preview
from launch.data.records import DataError
from launch.process.ranks import is_main, say


def preview(options: SftOptions, training_values: dict[str, Any], day: date) -> None:
    """Write a preview of the data of a run; the ranks after the first one do nothing.

    It is written into --output_dir, or into a folder beside the numbered runs: it starts no run. More dropped rows
    than a run accepts are shown, too. `day` is the date that a chat template is told: that of the run's first start.
    """
    if not is_main():
        return
    tokenizer, data = load_data(replace(options, max_dropped=1.0), day)
    folder = Path(training_values.get("output_dir") or RUNS / PREVIEW)
    seed = training_values.get("seed", SftTrainingArguments.seed)
    encoder = make_encoder(options, tokenizer, day)
    files = write_preview(folder, data, encoder, run_sources(options), options.preview, seed)
    try:
        check(data, options)
    except DataError as error:
        say(f"a run would stop: {error}")
    say(f"preview: {files[0]} and {files[1].name}; no model was loaded, and no run was started")
