"""The distribution that smoothing gives its mass to: uniform, counted over the training labels, or from a file."""

from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from launch.common.atomic_files import write_whole
from launch.common.errors import UserError
from launch.common.messages import counted, error_line
from launch.common.paths import SMOOTHING_PRIOR
from launch.config.options import SftOptions
from launch.config.smoothing_prior import UNIFORM, UNIGRAM
from launch.data.label_counts import label_counts
from launch.data.prepared import EncodedData
from launch.process.ranks import from_main, say

TOLERANCE = 1e-3  # of the sum of a file's numbers, which are then made to sum to 1


def check_prior_file(options: SftOptions, output_dir: str | None) -> None:
    """Raise `UserError` if --smoothing_prior names a file that is not there, unless the run has kept what it held."""
    kept = output_dir is not None and (Path(output_dir).expanduser() / SMOOTHING_PRIOR).exists()
    if options.smoothing_prior not in (UNIFORM, UNIGRAM) and not kept and not Path(options.smoothing_prior).is_file():
        raise UserError(f"--smoothing_prior {options.smoothing_prior}: no such file")


def loss_settings(options: SftOptions, prior: Tensor | None) -> dict[str, Any]:
    """Return the keyword arguments of `install_smoothed_loss` that say what is minimised."""
    return {"label_smoothing": options.smoothing, "smoothing_prior": prior, "z_loss": options.z_loss}


def smoothing_prior(
    options: SftOptions,
    data: EncodedData,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    run: Path | None = None,
) -> Tensor | None:
    """Return the prior of a run over the rows of its model's whole head, fp32 `[V]`; None: uniform.

    The first rank counts or reads it. A `run` keeps it, and resumes with what it has kept.

    Raises:
        UserError: if the file is not a distribution over this vocabulary.

    Collectives:
        One broadcast of an object; none for the uniform prior.
    """
    if options.smoothing_prior == UNIFORM:
        return None
    vocab_size = vocabulary_size(model)
    kept = None if run is None else run / SMOOTHING_PRIOR

    def find() -> tuple[numpy.ndarray, str]:
        if kept is not None and kept.exists():
            return read_prior(kept, vocab_size, vocab_size), f"that of this run, {kept}"
        ids = numpy.unique(list(tokenizer.get_vocab().values()))
        if options.smoothing_prior == UNIGRAM:
            prior, words = unigram(label_counts(data), ids, vocab_size)
        else:
            prior, words = read_prior(Path(options.smoothing_prior), vocab_size, int(ids[-1]) + 1), "from that file"
        if kept is not None:
            write_whole(kept, safetensors.torch.save({"smoothing_prior": torch.from_numpy(prior)}))
        return prior, words

    prior, words = from_main(find)
    say(f"smoothing prior {options.smoothing_prior}: {words}")
    return torch.from_numpy(prior)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return how many rows the model's output head has, also if ZeRO 3 has partitioned them."""
    weight = model.get_output_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def unigram(counts: numpy.ndarray, ids: numpy.ndarray, vocab_size: int) -> tuple[numpy.ndarray, str]:
    """Return `(count + 1) / (labels + tokens)` for each token of the tokenizer, 0 for other rows, and words for it.

    Args:
        counts: How often each token is a label, by its id.
        ids: The ids of the tokenizer's tokens.
        vocab_size: Rows of the model's head.
    """
    prior = numpy.zeros(max(vocab_size, len(counts)))
    prior[: len(counts)] = counts
    if len(prior) > vocab_size:
        raise UserError(f"a label is {len(counts) - 1}, and the model has a vocabulary of {vocab_size}")
    unseen = int(numpy.count_nonzero(prior[ids] == 0))
    words = f"counted over {prior.sum():,.0f} labels, each of {counted(len(ids), 'token')} once more"
    words += f" ({unseen:,} of them never is a label)" if unseen else ""
    prior[ids] += 1
    if rest := vocab_size - int(numpy.count_nonzero(prior)):
        words += f"; {counted(rest, 'row')} of the head that are no token get nothing"
    return (prior / prior.sum()).astype(numpy.float32), words


def read_prior(path: Path, vocab_size: int, tokens: int) -> numpy.ndarray:
    """Return a file's distribution, fp32 `[vocab_size]`: as many numbers, or one for each of `tokens` and no others.

    Raises `UserError` if it holds anything else.
    """
    try:
        values = _read(path)
    except Exception as error:  # a damaged file makes its reader fail in any way
        raise UserError(f"--smoothing_prior {path} cannot be read: {error_line(error)}") from None
    if values.shape not in ((vocab_size,), (tokens,)):
        sizes = f"{vocab_size}" if tokens >= vocab_size else f"{vocab_size}, or {tokens} for the tokenizer's tokens"
        raise UserError(
            f"--smoothing_prior {path} must hold one number for each row of the model's head ({sizes}), got shape "
            f"{tuple(values.shape)}"
        )
    if not (numpy.isfinite(values) & (values >= 0)).all():
        place = int(numpy.flatnonzero(~(numpy.isfinite(values) & (values >= 0)))[0])
        raise UserError(
            f"--smoothing_prior {path} must hold finite numbers of at least 0, got {values[place]} at {place}"
        )
    total = values.sum()
    if abs(total - 1) > TOLERANCE:
        raise UserError(f"--smoothing_prior {path} must sum to 1, got {total:.6g}; divide its numbers by that")
    return numpy.pad(values / total, (0, vocab_size - len(values))).astype(numpy.float32)


def _read(path: Path) -> numpy.ndarray:
    if path.suffix == ".npy":
        values = numpy.load(path, allow_pickle=False)
    else:
        tensors = safetensors.torch.load_file(path)
        if len(tensors) != 1:
            raise ValueError(f"it holds {counted(len(tensors), 'tensor')}, and one is expected")
        values = next(iter(tensors.values())).double().numpy()
    return values.astype(numpy.float64)
