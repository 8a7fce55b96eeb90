"""The numbers of every token of rows: forwards of a model whose vocabulary may be sharded."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.common.errors import UserError
from launch.config.options import SftOptions
from launch.data.batches import PadToLongest
from launch.evaluation.figures import Tokens
from launch.evaluation.numbers import batch_numbers, shifted
from launch.model.load import load_model
from launch.process.device import uses_gpu
from launch.process.ranks import on_all_ranks, rank, world_size
from smoothing.hf import exported_prior

FIELDS = ("nll", "confidence", "correct", "entropy", "sum_square", "nll_at")


class Evaluator:
    """A model that is ready to be evaluated, split over `options.tp` ranks. All ranks must make it.

    `beat` is told before each batch, and before what takes long.
    """

    def __init__(self, options: SftOptions, tokenizer: Any, bf16: bool, batch_size: int, beat: Callable[..., None]):
        self.beat = beat
        self.device = torch.device("cuda", torch.cuda.current_device()) if uses_gpu() else torch.device("cpu")
        self.tp, self.batch_size = options.tp, batch_size
        self.model = load_model(options, tokenizer, torch.bfloat16 if bf16 else torch.float32, seed=0)
        self.label_smoothing: float | None = getattr(self.model.config, "label_smoothing", None)
        try:
            self.prior = exported_prior(self.model)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.vocab_size: int = self.model.get_output_embeddings().weight.shape[0]
        self._engine = _split(self.model, self.tp, bf16) if self.tp > 1 else None
        self.model = self.model.to(self.device).eval() if self._engine is None else self._engine.module.eval()
        self.pad = PadToLongest(tokenizer.pad_token_id)

    @classmethod
    def of(cls, model: Any, tokenizer: Any, batch_size: int, prior: Tensor | None) -> "Evaluator":
        """Return one of a model that is being trained, whole on each rank. `prior`: see `batch_numbers`."""
        evaluator = cls.__new__(cls)
        evaluator.device, evaluator.tp, evaluator.batch_size = model.device, 1, batch_size
        evaluator.model, evaluator._engine, evaluator.prior = model.eval(), None, prior
        evaluator.beat = lambda *_, **__: None  # the run has its own
        evaluator.vocab_size = model.get_output_embeddings().weight.shape[0]
        evaluator.pad = PadToLongest(tokenizer.pad_token_id)
        return evaluator

    def close(self) -> None:
        """Give the model's memory back."""
        if self._engine is not None:
            self._engine.destroy()
        self.model = self._engine = None

    def tokens(self, rows: Any, kinds: np.ndarray, **options: Any) -> tuple[Tokens, Tokens | None]:
        """Return the numbers of every token with a label, and those without the smoothing where `unsmooth` says so.

        Args:
            rows: with input_ids and labels.
            kinds: the class of each entry of the vocabulary.
            **options: keyword arguments of `token_numbers`.

        Collectives: those of the forwards, and one gather of objects.
        """
        parts = on_all_ranks(lambda: self._own(rows, options))
        mine = [part for index, part in enumerate(parts) if index % self.tp == 0]
        whole = [np.concatenate(arrays) for arrays in zip(*mine, strict=True)]
        order = np.argsort(whole[0], kind="stable")
        row, label, *numbers = (array[order] for array in whole)
        plain, without = numbers[: len(FIELDS)], numbers[len(FIELDS) :]
        at = np.unique(row, return_inverse=True)[1]
        return Tokens(at, kinds[label], *plain), Tokens(at, kinds[label], *without) if without else None

    def _own(self, rows: Any, options: dict) -> list[np.ndarray]:
        """The numbers of the rows of this rank's group: row, label, and the fields, of each token."""
        groups, group = world_size() // self.tp, rank() // self.tp
        longest_first = np.argsort([-length for length in rows["length"]], kind="stable")[group::groups]
        prior = None if self.prior is None else self.prior.to(self.device)
        parts = []
        for start in range(0, len(longest_first), self.batch_size):
            self.beat(f"rows {start:,} to {start + self.batch_size:,} of {len(longest_first):,}")
            taken = longest_first[start : start + self.batch_size]
            batch: dict[str, Any] = self.pad([rows[int(index)] for index in taken])
            target = shifted(batch["labels"]).to(self.device)
            inputs = {key: batch[key].to(self.device) for key in ("input_ids", "attention_mask")}
            numbers = batch_numbers(self.model, self.model, inputs | {"use_cache": False}, target, prior, **options)
            valid = numbers.valid
            where = torch.from_numpy(taken).to(self.device).unsqueeze(1).expand_as(target)
            each = [where, target, *(getattr(numbers, name) for name in FIELDS)]
            if numbers.unsmoothed is not None:
                each += [getattr(numbers.unsmoothed, name) for name in FIELDS]
            parts.append([_to_numpy(x[valid]) for x in each])
        self.beat("the figures of all rows", storage=True)
        if not parts:
            raise UserError(f"there are {len(rows)} rows, fewer than the {groups} groups of ranks; start fewer")
        return [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]


def _split(model: Any, tp: int, bf16: bool) -> Any:
    """DeepSpeed's engine around the model, each layer shared by `tp` ranks."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 0},
        "bf16": {"enabled": bf16},
        "tensor_parallel": {"autotp_size": tp, "vocab_parallel_lm_head": True},
    }
    return deepspeed.initialize(model=model, config=config)[0]


def _to_numpy(x: Tensor) -> np.ndarray:
    return x.cpu().numpy() if not x.is_floating_point() else x.double().cpu().numpy()


KINDS = ("word start", "word rest", "digit", "symbol", "end")


def kinds_of(tokenizer: Any, vocab_size: int, ends: Sequence[int]) -> np.ndarray:
    """Return the class of each entry of the vocabulary, an index of KINDS."""
    kinds = np.full(vocab_size, KINDS.index("symbol"))
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), vocab_size))))
    for index, piece in enumerate(pieces):
        text = (piece or "").lstrip("Ġ▁ ")
        if text[:1].isdigit():
            kinds[index] = KINDS.index("digit")
        elif text[:1].isalpha():
            kinds[index] = KINDS.index("word rest" if text == piece else "word start")
    kinds[[end for end in ends if end < vocab_size]] = KINDS.index("end")
    return kinds
