"""`transformers.Trainer` that counts tokens: unsmoothed nll and accuracy beside the loss, exact over all ranks."""

import time

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import clip_grad_norm_
from transformers import Trainer, TrainerCallback

from smoothing import TokenStats


class TokenMeter:
    """Sums over label tokens since the last reading, kept on the device: no synchronisation in a step."""

    def __init__(self):
        self.sums: torch.Tensor | None = None

    def add(self, stats: TokenStats) -> None:
        now = torch.stack(
            [stats.nll.sum(dtype=torch.float64), stats.correct.sum().double(), stats.valid.sum().double()]
        )
        self.sums = now if self.sums is None else self.sums + now

    def read(self, copies: int, device) -> tuple[float, float, int]:
        """Mean nll, accuracy and count of label tokens over all ranks, then start anew.

        `copies`: how many ranks see the same tokens (the tensor-parallel size). Collectives: one all-reduce.
        """
        sums = torch.zeros(3, dtype=torch.float64, device=device) if self.sums is None else self.sums
        self.sums = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        nll, correct, tokens = (sums / copies).tolist()
        return nll / max(tokens, 1), correct / max(tokens, 1), round(tokens)


class Stage0GradNorm(TrainerCallback):
    """Keeps the norm that DeepSpeed computes and forgets when it clips fp32 gradients without ZeRO."""

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


class SftTrainer(Trainer):
    """Adds `nll`, `accuracy`, label tokens, tokens/s and peak memory to every log, `eval_nll` to evaluations."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.train_meter, self.eval_meter = TokenMeter(), TokenMeter()
        self._last_log, self._eval_seconds = time.monotonic(), 0.0
        self.add_callback(Stage0GradNorm(self))

    def count(self, stats: TokenStats) -> None:
        """The installed loss calls this with every forward's statistics."""
        (self.train_meter if self.model.training else self.eval_meter).add(stats)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            nll, accuracy, tokens = self.train_meter.read(self.get_tp_size(), self.args.device)
            now = time.monotonic()
            seconds = now - self._last_log - self._eval_seconds
            self._last_log, self._eval_seconds = now, 0.0
            logs |= {
                "nll": nll,
                "accuracy": accuracy,
                "label_tokens": tokens,
                "tokens_per_second": tokens / max(seconds, 1e-9),
                "peak_memory_gib": peak_memory_gib(),
            }
        super().log(logs, start_time)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        start = time.monotonic()
        self.eval_meter.sums = None
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        nll, accuracy, tokens = self.eval_meter.read(self.get_tp_size(), self.args.device)
        # Trainer's own eval_loss is a mean of batch means, which depends on how rows fall into batches
        output.metrics.pop(f"{metric_key_prefix}_loss", None)
        output.metrics[f"{metric_key_prefix}_nll"] = nll
        output.metrics[f"{metric_key_prefix}_accuracy"] = accuracy
        output.metrics[f"{metric_key_prefix}_label_tokens"] = tokens
        self._eval_seconds += time.monotonic() - start
        return output


def peak_memory_gib() -> float:
    """Largest memory this process has held: the device's allocator's high-water mark, or resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
