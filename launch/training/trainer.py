"""The training loop: `transformers.Trainer` with exact token counts and checkpoints that are complete or absent."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.trainer import TRAINER_STATE_NAME

from launch.common.errors import UserError
from launch.common.library_patches import name_defaults
from launch.common.paths import CHECKPOINT
from launch.config.limits import BEST_METRICS
from launch.evaluation.calibration import Calibration
from launch.model.attention_mask import padding_is_unseen
from launch.process.device import peak_memory_gib
from launch.process.ranks import from_main, is_main, on_all_ranks, say, world_size
from launch.process.signals import EvaluationCut, Stopped
from launch.process.watchdog import Watchdog
from launch.run import checkpoints
from launch.training.milestones import Milestones
from launch.training.nonfinite import NonFiniteSteps, check_weights, not_finite
from launch.training.throughput import Operations
from launch.training.token_meter import TokenMeter
from launch.training.trainer_overrides import TrainerWithHooks
from launch.training.warmup import rate_problem, warmup_problem
from smoothing import TokenStats
from smoothing.install import causal_lm


class SftTrainer(TrainerWithHooks):
    """Adds `nll`, `accuracy`, tokens, tokens/s, MFU and peak memory to every log, and `eval_nll` to evaluations.

    Args:
        nonfinite: Stops at or skips steps that are not finite.
        watchdog: Told what this rank does next.
        milestones: What is due after a step; must be the last callback when training starts.
        facts: Written into the manifest of every checkpoint.
        z_loss: Weight of the z-loss, which is then logged by itself.
        keep: How many checkpoints stay (--save_total_limit). `args.save_total_limit` must be None: Trainer would also
            remove all but the best one at the end, before the model is exported.
        fused_head: Whether tokens without a label stay out of the head.
        calibration: Measures evaluations in the place of the loss; None: only nll and accuracy are.
    """

    def __init__(
        self,
        *args,
        nonfinite: NonFiniteSteps,
        watchdog: Watchdog,
        milestones: Milestones,
        facts: dict,
        keep: int | None,
        z_loss: float = 0.0,
        fused_head: bool = True,
        calibration: Calibration | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.nonfinite, self.watchdog, self.milestones = nonfinite, watchdog, milestones
        self.facts, self.keep, self.z_loss, self.calibration = facts, keep, z_loss, calibration
        self.not_finite = set().union(*on_all_ranks(lambda: not_finite(self.model.named_parameters())))
        self.train_meter, self.eval_meter = TokenMeter(), TokenMeter()
        self._last_log, self._eval_seconds = time.monotonic(), 0.0
        self._operations = Operations.of(causal_lm(self.model), fused_head)
        self._where: list[str] = []
        self._padding_is_unseen = padding_is_unseen(causal_lm(self.model))

    def train(self, *args, **kwargs):
        last = self.callback_handler.callbacks[-1]
        if last is not self.milestones:
            raise RuntimeError(
                f"Milestones must be the last callback, since it overrules what the others have set; "
                f"{type(last).__name__} was added after it"
            )
        return super().train(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None and (problem := warmup_problem(self.args, num_training_steps)):
            say(f"warning: {problem}")
        name_defaults(self.optimizer if optimizer is None else optimizer)
        schedule = super().create_scheduler(num_training_steps, optimizer)
        if problem := rate_problem(self.args, schedule, num_training_steps):
            raise UserError(problem)
        return schedule

    def count(self, stats: TokenStats) -> None:
        """Take the statistics of a forward; the installed loss calls this."""
        if self.model.training:
            self.train_meter.add(stats)
            self.nonfinite.note(self._where, stats.nll)
        else:
            self.eval_meter.add(stats)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Give no batches once training is to stop: a run resumed at its end would otherwise make one more step."""
        if self.control.should_training_stop:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.train_meter.note(inputs["tokens"])
        self._take_unused(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            applied = self.deepspeed.was_step_applied()
            self.train_meter.keep() if applied else self.train_meter.drop()
            self.nonfinite.close(applied, self.state.global_step + 1, scaled=self.args.fp16)
        return loss

    def prediction_step(self, model, inputs, *args, **kwargs):
        self._take_unused(inputs)
        if self.calibration is not None:
            with self.compute_loss_context_manager():
                self.eval_meter.add_numbers(self.calibration.add(model, self._prepare_inputs(inputs)))
            return None, None, None
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _take_unused(self, inputs: dict) -> None:
        """Remove from a batch what the model does not need: counts, where its rows come from, an unneeded mask."""
        self._where = inputs.pop("where", [])
        inputs.pop("tokens", None)
        if self._padding_is_unseen:
            inputs.pop("attention_mask", None)  # packed rows come without

    @contextmanager
    def checkpoint_aside(self) -> Iterator[Path]:
        run, name = Path(self.args.output_dir), CHECKPOINT.format(step=self.state.global_step)
        weights, lost = self.model.named_parameters(), f"{name} is not written"
        on_all_ranks(lambda: check_weights(weights, self.not_finite, lost))
        self.watchdog.beat(f"saving {name}", storage=True)
        facts = self.facts | {"evaluation_owed": self.milestones.evaluation_owed}
        with checkpoints.written_aside(run, name, facts) as aside:
            yield aside
            self._point_to_best(aside / name, run)
        if is_main():
            checkpoints.rotate(run, self.keep, self.state.best_model_checkpoint)

    def _point_to_best(self, folder: Path, run: Path) -> None:
        """Correct the path of the best checkpoint, which Trainer noted while this one was still aside."""
        if step := self.state.best_global_step:
            best = run / CHECKPOINT.format(step=step)
            # evaluations may come between checkpoints; asked once for all ranks, which must go the same way
            saved = step == self.state.global_step or from_main(best.exists)
            self.state.best_model_checkpoint = str(best) if saved else None
            if is_main():
                self.state.save_to_json(folder / TRAINER_STATE_NAME)

    def best_not_exported(self) -> str | None:
        """Return why the last weights are exported though the best were wanted, or None."""
        if not self.args.load_best_model_at_end or self.state.best_model_checkpoint is not None:
            return None
        if not self.state.best_global_step:
            return "no evaluation has said which weights are best (--eval_steps), so the last ones are exported"
        return (
            f"step {self.state.best_global_step} evaluated best, but has no checkpoint (--save_steps), so the last "
            "weights are exported"
        )

    def check_best(self, checkpoint: Path) -> None:
        if problem := checkpoints.damage(checkpoint):
            raise UserError(
                f"the best checkpoint, {checkpoint}, is not whole: {problem}. Without --load_best_model_at_end the "
                "last weights are exported"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means = self.train_meter.read(self.get_tp_size(), self.args.device)
            now = time.monotonic()
            seconds = now - self._last_log - self._eval_seconds
            self._last_log, self._eval_seconds = now, 0.0
            logs |= {
                "nll": means.nll,
                **({"z_loss": self.z_loss * means.lse_square} if self.z_loss else {}),
                "accuracy": means.accuracy,
                "label_tokens": means.labels,
                "tokens": means.tokens,
                "tokens_per_second": means.tokens / max(seconds, 1e-9),
                "peak_memory_gib": peak_memory_gib(),
            }
            if (mfu := self._operations.utilisation(means.tokens, means.labels, seconds, world_size())) is not None:
                logs["mfu"] = mfu
        super().log(logs, start_time)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        try:
            return super().evaluate(*args, **kwargs)
        except EvaluationCut:
            if not self.milestones.stepped:
                raise Stopped(
                    self.milestones.stop.signal, "stopped before the first step; no progress was lost"
                ) from None
            self.control = self.milestones.cut_evaluation(self.control)  # type: ignore[has-type]
            return dict.fromkeys(BEST_METRICS, math.nan)  # never better than the best

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        start = time.monotonic()
        self.eval_meter.reset()
        if self.calibration is not None:
            self.calibration.reset()  # of an evaluation that a signal has cut
        here = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(here):  # so that training is the same with and without evaluations
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self.eval_meter.read(self.get_tp_size(), self.args.device)
        # Trainer's own eval_loss is a mean of batch means, which depends on how rows are grouped into batches
        output.metrics.pop(f"{metric_key_prefix}_loss", None)
        more = {} if self.calibration is None else self.calibration.figures()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in more.items()})
        output.metrics[f"{metric_key_prefix}_nll"] = means.nll
        output.metrics[f"{metric_key_prefix}_accuracy"] = means.accuracy
        output.metrics[f"{metric_key_prefix}_label_tokens"] = means.labels
        self._eval_seconds += time.monotonic() - start
        return output
