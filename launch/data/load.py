"""The data of a run: from its options to a tokenizer and two encoded splits, with a printed summary."""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from launch.config.options import SftOptions
from launch.data.encode import EncodedData, encode_examples
from launch.data.examples.rows import IGNORED
from launch.data.read import read_examples, training_texts
from launch.data.tokenizer import load_tokenizer
from launch.process.ranks import say


def load_data(options: SftOptions) -> tuple[PreTrainedTokenizerBase, EncodedData]:
    """Load the tokenizer and the encoded rows; print what was found and dropped, and one row with its label mask."""
    examples = read_examples(options.data, options.eval_data, options.strict, options.eval_fraction)
    tokenizer = load_tokenizer(options, lambda: training_texts(examples.train))
    data = encode_examples(examples, tokenizer, options.max_length, options.strict)
    say(f"data: {len(data.train):,} rows to train on, {len(data.heldout):,} held out, format {examples.format}")
    for note in [*examples.notes, *data.report.summary().splitlines()]:
        say(f"  {note}")
    say(describe_example(data.train[0], tokenizer))
    return tokenizer, data


def describe_example(row: Mapping, tokenizer) -> str:
    """Describe a row for people: its `where`, its token counts, which text is context and which is learned."""
    ids, labels = row["input_ids"], row["labels"]
    learned = sum(label != IGNORED for label in labels[1:])
    lines = [f"{row.get('where', 'row')}: {len(ids)} tokens, {learned} of them learned"]
    start = 0
    for position in range(1, len(ids) + 1):
        inside = labels[start] != IGNORED
        if position == len(ids) or (labels[position] != IGNORED) != inside:
            text = tokenizer.decode(ids[start:position], skip_special_tokens=False)
            lines.append(f"  {'learned' if inside else 'read   '} | {text!r}")
            start = position
    return "\n".join(lines)
