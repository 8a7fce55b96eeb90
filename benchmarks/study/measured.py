"""What is measured of a model on the held-out rows: the numbers of each token, as they are and after each arm."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from launch.config.options import SftOptions
from launch.data.load import load_data
from launch.evaluation.figures import Tokens, fitted
from launch.evaluation.forward import Evaluator, kinds_of
from launch.evaluation.report import TEMPERATURES

BATCH = 16


@dataclass(frozen=True)
class Measured:
    """Tokens of the model at one epoch.

    Every arm is measured on the odd rows; what is chosen (a temperature, an epoch) is chosen by the even ones.
    """

    even: Tokens
    as_trained: Tokens
    unsmoothed: Tokens
    after_temperature: Tokens
    temperature: float

    @staticmethod
    def file(epoch: int) -> str:
        return f"epoch-{epoch}.npz"

    def write(self, file: Path) -> None:
        """Write it whole or not at all."""
        arrays: dict[str, np.ndarray] = {"temperature": np.array(self.temperature)}
        for part in PARTS:
            tokens = getattr(self, part)
            arrays |= {f"{part}.{field.name}": getattr(tokens, field.name) for field in fields(Tokens)}
        partial = file.with_suffix(".partial.npz")
        np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]
        partial.rename(file)

    @classmethod
    def read(cls, file: Path) -> "Measured":
        arrays = np.load(file)
        parts = {
            part: Tokens(**{field.name: arrays[f"{part}.{field.name}"] for field in fields(Tokens)}) for part in PARTS
        }
        return cls(**parts, temperature=float(arrays["temperature"]))


PARTS = ("even", "as_trained", "unsmoothed", "after_temperature")


def measure(model, tokenizer, rows: str, options: SftOptions, prior: Tensor | None) -> Measured:
    """Measure a model that is being trained, on the rows of a file. `prior`: that of its smoothing; None: uniform."""
    data = load_data(replace(options, data=[rows], eval_fraction=0.0), purpose="to measure on")[1]
    training = model.training
    evaluator = Evaluator.of(model, tokenizer, BATCH, prior)
    kinds = kinds_of(tokenizer, evaluator.vocab_size, data.summary.stops)
    even, odd = (data.train.select(range(first, len(data.train), 2)) for first in (0, 1))
    chosen_by, _ = evaluator.tokens(even, kinds, temperatures=TEMPERATURES)
    as_trained, unsmoothed = evaluator.tokens(odd, kinds, temperatures=TEMPERATURES, unsmooth=options.smoothing)
    temperature = float(fitted(chosen_by.nll_at.mean(0)[None], TEMPERATURES)[0])
    scaled, _ = evaluator.tokens(odd, kinds, temperatures=TEMPERATURES, temperature=temperature)
    model.train(training)
    return Measured(chosen_by, as_trained, unsmoothed or as_trained, scaled, temperature)
