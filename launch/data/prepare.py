"""From a run's options to its tokenizer and encoded rows, telling the user what was found."""

from transformers import PreTrainedTokenizerBase

from launch.config.options import SftOptions
from launch.data.load import EncodedData, describe_example, encode_examples, read_examples, training_texts
from launch.model.load import load_tokenizer
from launch.process.ranks import say


def load_data(options: SftOptions) -> tuple[PreTrainedTokenizerBase, EncodedData]:
    """Tokenizer and encoded rows; says what was found, what was dropped, and shows one row with its mask."""
    examples = read_examples(options.data, options.eval_data, options.strict, options.eval_fraction)
    tokenizer = load_tokenizer(options, lambda: training_texts(examples.train))
    data = encode_examples(examples, tokenizer, options.max_length, options.strict)
    say(f"data: {len(data.train):,} rows to train on, {len(data.heldout):,} held out, format {examples.format}")
    for note in [*examples.notes, *data.report.summary().splitlines()]:
        say(f"  {note}")
    say(describe_example(data.train[0], tokenizer))
    return tokenizer, data
