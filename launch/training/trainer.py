"""`transformers.Trainer` that counts tokens exactly over all ranks, and writes checkpoints that are whole."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import clip_grad_norm_
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from launch.common.errors import UserError
from launch.common.paths import CHECKPOINT
from launch.common.units import GIB
from launch.data.sampler import GroupedByLength
from launch.model.attention_mask import padding_is_unseen
from launch.process.device import uses_gpu
from launch.process.ranks import is_main, on_all_ranks
from launch.process.signals import EvaluationCut, Stopped
from launch.process.watchdog import Watchdog
from launch.run import checkpoints
from launch.training.loaded import follow_this_schedule, place_step_counts
from launch.training.milestones import Milestones
from launch.training.nonfinite import NonFiniteSteps, check_weights, not_finite, skip_without_zero
from smoothing import TokenStats


class TokenMeter:
    """Sums over tokens since the last reading, kept on the device: no synchronisation in a step."""

    def __init__(self):
        self.sums: torch.Tensor | None = None  # of the label tokens
        self._before: torch.Tensor | None = None
        self._tokens: torch.Tensor | int = 0  # prompts too

    def note(self, attention_mask: torch.Tensor) -> None:
        """Tokens that the model is about to read."""
        self._tokens = self._tokens + attention_mask.sum()

    def keep(self) -> None:
        """What was added until now stays."""
        self._before = self.sums

    def drop(self) -> None:
        """Forget what was added since the last `keep`: a step that was left out."""
        self.sums = self._before

    def add(self, stats: TokenStats) -> None:
        now = torch.stack(
            [stats.nll.sum(dtype=torch.float64), stats.correct.sum().double(), stats.valid.sum().double()]
        )
        self.sums = now if self.sums is None else self.sums + now

    def read(self, copies: int, device) -> tuple[float, float, int, int]:
        """Mean nll, accuracy and count of label tokens over all ranks, and the count of all tokens; then start anew.

        `copies`: how many ranks see the same tokens (the tensor-parallel size). Collectives: one all-reduce.
        """
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        if self.sums is not None:
            sums[:3] = self.sums
        sums[3] = self._tokens
        self.sums, self._before, self._tokens = None, None, 0
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        nll, correct, labels, tokens = (sums / copies).tolist()
        return nll / max(labels, 1), correct / max(labels, 1), round(labels), round(tokens)


class Stage0GradNorm(TrainerCallback):
    """Keeps the norm that DeepSpeed computes and forgets when it clips fp32 gradients without ZeRO, and heeds it."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        engine = self.trainer.deepspeed
        if engine.zero_optimization_stage() == 0:
            engine.clip_fp32_gradients = lambda: self._clip(engine)

    @staticmethod
    def _clip(engine) -> None:
        parameters, limit = engine.module.parameters(), engine.gradient_clipping()
        engine._global_grad_norm = clip_grad_norm_(parameters, limit, mpu=engine.mpu)
        skip_without_zero(engine, engine._global_grad_norm)


class SftTrainer(Trainer):
    """Adds `nll`, `accuracy`, tokens, tokens/s and peak memory to every log, `eval_nll` to evaluations.

    Checkpoints are written aside and renamed (`launch.run.checkpoints`), with `facts` in their manifests; steps that
    are not finite are stopped at or left out (`launch.training.nonfinite`).
    """

    def __init__(self, *args, nonfinite: NonFiniteSteps, watchdog: Watchdog, facts: dict, **kwargs):
        super().__init__(*args, **kwargs)
        self.nonfinite, self.watchdog, self.facts = nonfinite, watchdog, facts
        self.not_finite = set().union(*on_all_ranks(lambda: not_finite(self.model.named_parameters())))
        self.milestones: Milestones | None = None
        self.train_meter, self.eval_meter = TokenMeter(), TokenMeter()
        self._last_log, self._eval_seconds = time.monotonic(), 0.0
        self._where: list[str] = []
        self._aside: Path | None = None
        self._by_length: GroupedByLength | None = None
        self._padding_is_unseen = padding_is_unseen(self.model)
        self.add_callback(Stage0GradNorm(self))
        self.add_callback(watchdog)

    def count(self, stats: TokenStats) -> None:
        """The installed loss calls this with every forward's statistics."""
        if self.model.training:
            self.train_meter.add(stats)
            self.nonfinite.note(self._where, stats.nll)
        else:
            self.eval_meter.add(stats)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            applied = self.deepspeed.was_step_applied()
            self.train_meter.keep() if applied else self.train_meter.drop()
            self.nonfinite.close(applied, self.state.global_step + 1, scaled=self.args.fp16)
        return loss

    def _prepare_inputs(self, inputs):
        self._where = inputs.pop("where", [])  # of the rows; the model has no use for it
        if self.model.training:
            self.train_meter.note(inputs["attention_mask"])
        if self._padding_is_unseen:
            del inputs["attention_mask"]
        return super()._prepare_inputs(inputs)

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        replicas = self.args.world_size // self.get_tp_size()
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * replicas
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._by_length = GroupedByLength(rows, [len(ids) for ids in self.train_dataset["input_ids"]], seed)
        return self._by_length

    def _run_epoch(self, *args, epoch: int, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed at its end; Trainer would take one step more
            self.control.should_training_stop = True
            return None
        if self._by_length is not None:  # Trainer does not reach it through what skips batches on several ranks
            self._by_length.set_epoch(epoch)
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            place_step_counts(self.deepspeed.basic_optimizer)
            schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate wraps it
            follow_this_schedule(schedule, self.optimizer)

    def _save_checkpoint(self, model, trial) -> None:
        run, name = Path(self.args.output_dir), CHECKPOINT.format(step=self.state.global_step)
        weights, lost = self.model.named_parameters(), f"{name} is not written"
        on_all_ranks(lambda: check_weights(weights, self.not_finite, lost))
        self.watchdog.beat(f"saving {name}", storage=True)
        try:
            owed = self.milestones is not None and self.milestones.evaluation_owed
            with checkpoints.written_aside(run, name, self.facts | {"evaluation_owed": owed}) as self._aside:
                super()._save_checkpoint(model, trial)
                self._point_to_best(self._aside / name, run)
        finally:
            self._aside = None
        if is_main():
            checkpoints.rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _finalize_training(self, *args, **kwargs):
        """Without Trainer's removal of all checkpoints but the best one: nothing is exported yet."""
        if self.state.best_global_step:  # in this directory, wherever it was copied from
            best = Path(self.args.output_dir) / CHECKPOINT.format(step=self.state.best_global_step)
            self.state.best_model_checkpoint = str(best)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if fault := checkpoints.damage(best):
            raise UserError(
                f"the best checkpoint, {best}, is not whole: {fault}; without --load_best_model_at_end the last "
                "weights are exported"
            )
        super()._load_best_model()

    def _point_to_best(self, folder: Path, run: Path) -> None:
        """Trainer has noted where the best checkpoint is while this one lies aside."""
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(run / CHECKPOINT.format(step=self.state.best_global_step))
            if is_main():
                self.state.save_to_json(folder / TRAINER_STATE_NAME)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            nll, accuracy, labels, tokens = self.train_meter.read(self.get_tp_size(), self.args.device)
            now = time.monotonic()
            seconds = now - self._last_log - self._eval_seconds
            self._last_log, self._eval_seconds = now, 0.0
            logs |= {
                "nll": nll,
                "accuracy": accuracy,
                "label_tokens": labels,
                "tokens": tokens,
                "tokens_per_second": tokens / max(seconds, 1e-9),
                "peak_memory_gib": peak_memory_gib(),
            }
        super().log(logs, start_time)

    def _evaluate(self, *args, **kwargs) -> dict[str, float]:
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationCut:
            if not self.milestones.stepped:
                raise Stopped(self.milestones.stop.signal, "stopped before the first step; nothing is lost") from None
            self.control = self.milestones.cut_evaluation(self.control)
            return {}

    def _determine_best_metric(self, metrics, trial) -> bool:
        return bool(metrics) and super()._determine_best_metric(metrics, trial)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        start = time.monotonic()
        self.eval_meter.sums = None
        here = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(here):  # evaluating or not changes nothing of the training
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        nll, accuracy, labels, _ = self.eval_meter.read(self.get_tp_size(), self.args.device)
        # Trainer's own eval_loss is a mean of batch means, which depends on how rows fall into batches
        output.metrics.pop(f"{metric_key_prefix}_loss", None)
        output.metrics[f"{metric_key_prefix}_nll"] = nll
        output.metrics[f"{metric_key_prefix}_accuracy"] = accuracy
        output.metrics[f"{metric_key_prefix}_label_tokens"] = labels
        self._eval_seconds += time.monotonic() - start
        return output


def peak_memory_gib() -> float:
    """Largest memory this process has held: the device's allocator's high-water mark, or resident memory on a CPU."""
    if uses_gpu():
        return torch.cuda.max_memory_allocated() / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
