"""The smoothed loss in a `transformers.Trainer`."""

from typing import Any

from transformers import TrainerCallback

from smoothing.install import install_smoothed_loss
from smoothing.model.installed_loss import InstalledLoss


class SmoothedLossCallback(TrainerCallback):
    """Calls `install_smoothed_loss(model, **options)` on `on_train_begin`, when DeepSpeed has sharded the model.

    The loss stays installed for evaluations after training; `callback.installed.remove()` takes it out.

    Args:
        **options: keyword arguments of `install_smoothed_loss`.

    Raises:
        ValueError: in `on_train_begin`, in a process with several GPUs, whose model Trainer would copy to each; and
            what `install_smoothed_loss` raises.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.installed: InstalledLoss | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.n_gpu > 1:  # nn.DataParallel copies the model, and a copy's forward would be this one's
            raise ValueError(f"start one process for each of the {args.n_gpu} GPUs: deepspeed or torchrun SCRIPT")
        if self.installed is None:
            self.installed = install_smoothed_loss(model, **self.options)
