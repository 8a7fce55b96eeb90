"""TRL's `SFTTrainer` with the smoothed loss, and with the metrics that TRL logs. Written for TRL 1.16."""

from typing import Any

import torch
import transformers
from trl import SFTTrainer

from smoothing.calibration.numbers import TokenNumbers
from smoothing.core.call import TokenStats
from smoothing.hf import SmoothedLossCallback
from smoothing.install import causal_lm
from smoothing.model.support import text_config


class SmoothedSFTTrainer(SFTTrainer):
    """`SFTTrainer` whose loss is the smoothed one, without logits; SFTTrainer's own smoothing makes all of them.

    Packing, padding-free batches, completion-only loss, PEFT and the auxiliary loss of mixtures of experts are as in
    SFTTrainer, and so are its metrics. `entropy` is of the micro-batches of each step that is logged, where
    SFTTrainer takes all: the loss does not need it, and it costs one more product of the head. In evaluation the
    loss is the plain nll, and logits are made only for `compute_metrics` and `predict`.

    Args:
        *args: as `SFTTrainer`.
        label_smoothing: ε, in [0, 1].
        loss_options: further arguments of `install_smoothed_loss`, such as `head` or `z_loss`.
        **kwargs: as `SFTTrainer`.

    Raises:
        ValueError: for a `label_smoothing_factor`, another `loss_type` than "nll" or a `compute_loss_func`, and what
            `install_smoothed_loss` raises, when training begins.
    """

    def __init__(
        self, *args: Any, label_smoothing: float = 0.1, loss_options: dict[str, Any] | None = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        if problem := _other_loss(self):
            raise ValueError(problem)
        options = {"on_stats": None, **(loss_options or {})}
        self._on_stats = options["on_stats"]
        self.smoothed = SmoothedLossCallback(**options | {"label_smoothing": label_smoothing, "on_stats": self._told})
        self.add_callback(self.smoothed)
        self._stats: TokenStats | None = None
        self._numbers: TokenNumbers | None = None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The smoothed loss of a batch as `Trainer` divides it, and what SFTTrainer logs of one."""
        installed = self.smoothed.installed
        if installed is None:  # nothing has been trained yet
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False  # as SFTTrainer does
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        mode = "train" if self.model.training else "eval"
        installed.logits_in_eval = return_outputs
        installed.on_numbers = self._measured if mode == "eval" or self._is_logged() else None
        loss, outputs = transformers.Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        if self.aux_loss_enabled:
            loss = loss + self._aux_weight(model, num_items_in_batch) * outputs.aux_loss
        self._log_metrics(mode, inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def _told(self, stats: TokenStats) -> None:
        self._stats = stats
        if self._on_stats is not None:
            self._on_stats(stats)

    def _measured(self, numbers: TokenNumbers) -> None:
        self._numbers = numbers

    def _is_logged(self) -> bool:
        """Whether the step under way is one that is logged by itself, or steps are not what decides it."""
        step = self.state.global_step + 1
        if self.args.logging_strategy != transformers.trainer_utils.IntervalStrategy.STEPS:
            return True
        return bool(step % self.state.logging_steps == 0 or (step == 1 and self.args.logging_first_step))

    def _aux_weight(self, model: Any, num_items_in_batch: Any) -> float:
        """What to add of the auxiliary loss: the model has added it as if it were a sum over labels, as these are."""
        counted = num_items_in_batch is not None and self.model_accepts_loss_kwargs
        averaged = counted and self.args.average_tokens_across_devices
        scale = self.accelerator.num_processes // self.get_tp_size() if averaged else 1
        steps = self.current_gradient_accumulation_steps if counted else 1
        weight: float = self.router_aux_loss_coef / steps - _own_aux_weight(causal_lm(self.model)) * scale
        return weight

    def _log_metrics(self, mode: str, inputs: dict[str, Any], outputs: Any) -> None:
        """Put what SFTTrainer logs where its `log` looks for it."""
        stats, numbers = self._stats, self._numbers
        self._stats = self._numbers = None
        assert stats is not None, "the installed loss has been called, or the forward has raised"
        sums = [stats.valid.sum(), 0 if stats.correct is None else stats.correct.sum()]
        sums.append(0 if numbers is None else numbers.entropy.sum())
        local = torch.stack([torch.as_tensor(x, device=stats.nll.device, dtype=torch.double) for x in sums])
        labels, correct, entropy = self.accelerator.gather_for_metrics(local.unsqueeze(0)).sum(0).tolist()
        metrics = self._metrics[mode]
        metrics["mean_token_accuracy"].append(correct / labels if labels else 0.0)
        if numbers is not None:
            metrics["entropy"].append(entropy / labels if labels else 0.0)
        if mode == "train":
            tokens = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["position_ids"].numel()
            tokens = torch.as_tensor(tokens, device=local.device)
            self._total_train_tokens += int(self.accelerator.gather_for_metrics(tokens).sum()) // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]
        if self.aux_loss_enabled:
            metrics["aux_loss"].append(self.accelerator.gather_for_metrics(outputs.aux_loss.detach()).mean().item())


def _other_loss(trainer: SFTTrainer) -> str | None:
    """Why this trainer would compute another loss than the smoothed one, or None."""
    args = trainer.args
    if args.label_smoothing_factor:
        return (
            f"label_smoothing_factor={args.label_smoothing_factor} of the SFTConfig makes all logits: set it to 0, "
            f"and pass SmoothedSFTTrainer(..., label_smoothing={args.label_smoothing_factor})"
        )
    if args.loss_type != "nll":
        return f"loss_type={args.loss_type!r} is no smoothed loss: leave it at 'nll', or use SFTTrainer"
    if trainer.compute_loss_func is not None:
        return "compute_loss_func is no smoothed loss: leave it out, or use SFTTrainer"
    return None


def _own_aux_weight(model: Any) -> float:
    """What a mixture of experts multiplies its auxiliary loss by."""
    names = ("router_aux_loss_coef", "aux_loss_coef")
    own = next((value for name in names if (value := getattr(model, name, None)) is not None), None)
    return float(text_config(model).router_aux_loss_coef if own is None else own)
