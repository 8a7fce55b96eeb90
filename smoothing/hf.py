"""The smoothed loss in a `transformers.Trainer`."""

from transformers import TrainerCallback

from smoothing.install import InstalledLoss, install_smoothed_loss


class SmoothedLossCallback(TrainerCallback):
    """Calls `install_smoothed_loss(model, **options)` on `on_train_begin`, when DeepSpeed has sharded the model.

    The loss stays installed for evaluations after training; `callback.installed.remove()` takes it out.
    """

    def __init__(self, **options):
        self.options = options
        self.installed: InstalledLoss | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.installed is None:
            self.installed = install_smoothed_loss(model, **self.options)
