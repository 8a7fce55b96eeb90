"""The smoothed loss in a `transformers.Trainer`, and smoothing taken out of what `generate` samples from."""

import inspect
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LogitsProcessor, Trainer, TrainerCallback
from transformers.utils import cached_file

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
            a `label_smoothing_factor`, a `compute_loss_func`, or a trainer of TRL's, and what `install_smoothed_loss`
            raises; before the first step of the optimizer if the loss has not been called.
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
        if problem := _other_loss(_calling_trainer()):
            raise ValueError(problem)
        if self.installed is None:
            self.installed = install_smoothed_loss(model, **self.options)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.installed is not None and not self.installed.called:
            raise ValueError(
                "the trainer has computed another loss than the installed one, which has not been called: its own "
                "compute_loss takes the labels away from it; leave it out, or call Trainer.compute_loss in it"
            )


def _calling_trainer() -> Any:
    """The trainer whose event is being handled, by the frames of the calls: it hands callbacks all but itself."""
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), Trainer):
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


def _other_loss(trainer: Any) -> str | None:
    """Why this trainer would not call the loss of its model, or None."""
    if getattr(trainer, "compute_loss_func", None) is not None:
        return (
            "compute_loss_func would take the labels away from the installed loss: leave it out, "
            "SmoothedLossCallback is the loss"
        )
    if any(kind.__module__.startswith("trl.") for kind in type(trainer).__mro__) and not hasattr(trainer, "smoothed"):
        return (
            f"TRL's {type(trainer).__name__} computes its loss itself: leave out SmoothedLossCallback, and take "
            "smoothing.trl.SmoothedSFTTrainer(..., label_smoothing=) in the place of SFTTrainer"
        )
    return None


def exported_prior(model: Any) -> Tensor | None:
    """Return the prior that a model was trained with, `[V]`: of the file beside it that its configuration names.

    Args:
        model: a Hugging Face model, as `launch/sft.py` exports it.

    Returns:
        The prior, or None if it was uniform.

    Raises:
        ValueError: if the file is not there.
    """
    name = getattr(model.config, "smoothing_prior", None)
    if name is None:
        return None
    place = model.config.name_or_path
    try:
        file = cached_file(place, name, revision=getattr(model.config, "_commit_hash", None))
    except OSError as error:
        raise ValueError(f"the model was trained with a smoothing prior, and {name} is not in {place}") from error
    prior: Tensor
    (prior,) = load_file(file).values()
    return prior


class UnsmoothLogits(LogitsProcessor):
    """Takes the smoothing out of the probabilities that `generate` samples from: `logits_processor=[...]`.

    Greedy and beam search choose by order, which a uniform prior keeps; sampling meets fewer unlikely tokens.
    `generate` applies it before temperature, top-k and top-p, as it must be: what they leave is no smoothed
    distribution. In a list of processors of your own put it before any that changes logits, such as a penalty.

    Args:
        label_smoothing: ε that the model was trained with, in [0, 1).
        floor: see `unsmooth`.
        prior: see `unsmooth`.

    Raises:
        ValueError: for an ε outside of [0, 1).
    """

    def __init__(self, label_smoothing: float, floor: float = FLOOR, prior: Tensor | None = None) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing!r}")
        self.label_smoothing, self.floor, self.prior = float(label_smoothing), floor, prior

    @classmethod
    def of(cls, model: Any, floor: float = FLOOR) -> "UnsmoothLogits":
        """Return the processor for the ε in a model's configuration, where `launch/sft.py` writes it, and its prior.

        Args:
            model: a Hugging Face model.
            floor: see `unsmooth`.

        Raises:
            ValueError: if there is no ε, or the file of the prior is not there.
        """
        label_smoothing = getattr(model.config, "label_smoothing", None)
        if label_smoothing is None:
            raise ValueError("the model's config.json has no label_smoothing; pass UnsmoothLogits(label_smoothing)")
        return cls(label_smoothing, floor, exported_prior(model))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_probs = scores.float().log_softmax(-1)
        log_probs = unsmooth(log_probs, self.label_smoothing, prior=self.prior, floor=self.floor)
        return log_probs.masked_fill(scores.isneginf(), -torch.inf)  # what another processor forbids stays forbidden
