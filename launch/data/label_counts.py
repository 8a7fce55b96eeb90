"""How often each token is a label in an epoch of the training rows."""

import numpy

from launch.data.examples.rows import IGNORED
from launch.data.prepared import EncodedData
from launch.data.rows_file import ROWS_A_BATCH
from launch.data.weights import rows_of_sources


def label_counts(data: EncodedData) -> numpy.ndarray:
    """Return counts by token id, fp64 `[largest + 1]`; a source with a weight counts as often as its rows are taken.

    A row's first label is left out, as the loss does: nothing predicts it.
    """
    sources = data.sources
    taken = [len(source) for source in sources]
    if data.weights is not None:
        taken = rows_of_sources(data.weights, sum(taken))
    total = numpy.zeros(0)
    for source, count in zip(sources, taken, strict=True):
        rows = data.train.select(source).select_columns(["labels"]).with_format("arrow")
        for batch in rows.iter(ROWS_A_BATCH):
            column = batch["labels"].combine_chunks()
            labels, lengths = column.flatten().to_numpy().copy(), column.value_lengths().to_numpy()
            labels[numpy.cumsum(lengths) - lengths] = IGNORED
            found = numpy.bincount(labels[labels != IGNORED]) * (count / len(source))
            total = numpy.pad(total, (0, max(0, len(found) - len(total))))
            total[: len(found)] += found
    return total
