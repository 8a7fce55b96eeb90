"""The smoothed loss in a `transformers.Trainer`, and smoothing taken out of what `generate` samples from."""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, TrainerCallback

from smoothing.calibration.numbers import FLOOR
from smoothing.calibration.unsmooth import unsmooth
from smoothing.install import install_smoothed_loss
from smoothing.model.installed_loss import InstalledLoss


class SmoothedLossCallback(TrainerCallback):
    """Calls `install_smoothed_loss(model, **options)` on `on_train_begin`, when DeepSpeed has sharded the model.

    The loss stays installed for evaluations after training; `callback.installed.remove()` takes it out.

    Args:
        **options: keyword arguments of `install_smoothed_loss`.

    Raises:
        ValueError: in `on_train_begin`, in a process with several GPUs, whose model Trainer would copy to each, with
            a `label_smoothing_factor`, and what `install_smoothed_loss` raises; before the first step of the
            optimizer if the loss has not been called, as with a `compute_loss_func`, which a callback cannot see.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.installed: InstalledLoss | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.n_gpu > 1:  # nn.DataParallel copies the model, and a copy's forward would be this one's
            raise ValueError(f"start one process for each of the {args.n_gpu} GPUs: deepspeed or torchrun SCRIPT")
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={args.label_smoothing_factor} of the TrainingArguments would take the "
                "labels away from the installed loss: set it to 0; SmoothedLossCallback has its own label_smoothing="
            )
        if self.installed is None:
            self.installed = install_smoothed_loss(model, **self.options)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.installed is not None and not self.installed.called:
            raise ValueError(
                "the trainer has computed another loss than the installed one, which has not been called: "
                "compute_loss_func, or a compute_loss of its own, takes the labels away from it; leave it out"
            )


class UnsmoothLogits(LogitsProcessor):
    """Takes the smoothing out of the probabilities that `generate` samples from: `logits_processor=[...]`.

    Greedy and beam search choose by order, which a uniform smoothing keeps; sampling meets fewer unlikely tokens.

    Args:
        label_smoothing: ε that the model was trained with, in [0, 1).
        floor: see `unsmooth`.

    Raises:
        ValueError: for an ε outside of [0, 1).
    """

    def __init__(self, label_smoothing: float, floor: float = FLOOR) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing!r}")
        self.label_smoothing, self.floor = float(label_smoothing), floor

    @classmethod
    def of(cls, model: Any, floor: float = FLOOR) -> "UnsmoothLogits":
        """Return the processor for the ε in a model's own configuration, where `launch/sft.py` writes it.

        Args:
            model: a Hugging Face model.
            floor: see `unsmooth`.

        Raises:
            ValueError: if there is none.
        """
        label_smoothing = getattr(model.config, "label_smoothing", None)
        if label_smoothing is None:
            raise ValueError("the model's config.json has no label_smoothing; pass UnsmoothLogits(label_smoothing)")
        return cls(label_smoothing, floor)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_probs = unsmooth(scores.float().log_softmax(-1), self.label_smoothing, floor=self.floor)
        return log_probs.masked_fill(scores.isneginf(), -torch.inf)  # what another processor forbids stays forbidden
