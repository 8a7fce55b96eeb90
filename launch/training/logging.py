"""What a run prints and writes while it trains, on rank 0: a progress bar, a line a log, `metrics.jsonl`."""

import json
import math
import sys
import time
from datetime import timedelta
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from launch.common.atomic_files import write_whole
from launch.common.paths import DEEPSPEED, METRICS
from launch.evaluation.calibration import Calibration
from launch.evaluation.draw import said

METRICS_OF_LOGS = {
    "loss": "loss",
    "nll": "nll",
    "z_loss": "z_loss",
    "accuracy": "accuracy",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
    "label_tokens": "label_tokens",
    "tokens": "tokens",
    "tokens_per_second": "tokens_per_second",
    "mfu": "mfu",
    "peak_memory_gib": "peak_memory_gib",
    "eval_nll": "eval_nll",
    "eval_accuracy": "eval_accuracy",
    "eval_label_tokens": "eval_label_tokens",
}
TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


class ResolvedDeepSpeed(TrainerCallback):
    """Writes `deepspeed.json`, once Trainer has filled in the recipe's values for "auto"."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            config = json.dumps(args.hf_deepspeed_config.config, indent=2, default=str)
            write_whole(Path(args.output_dir) / DEEPSPEED, config + "\n")


def finite(value: float) -> float | None:
    """Return None for NaN and infinities, which JSON does not have."""
    return value if math.isfinite(value) else None


class MetricsFile(TrainerCallback):
    """Appends one JSON object to `metrics.jsonl` for every logged step and every evaluation."""

    def __init__(self, calibration: Calibration | None = None):
        self.calibration = calibration

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and ("loss" in logs or "eval_nll" in logs):
            row = {name: finite(logs[key]) for key, name in METRICS_OF_LOGS.items() if key in logs}
            row = {"step": state.global_step} | row
            if self.calibration is not None and "eval_ece_equal_mass" in logs:
                row |= {key: finite(logs[key]) for key in logs if key.startswith("eval_") and key not in TIMES}
                row["eval_reliability"] = self.calibration.bins
            with (Path(args.output_dir) / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


class Progress(ProgressCallback):
    """A progress bar on a terminal, and one readable line for each log, with the time that passed and remains."""

    def on_train_begin(self, args, state, control, **kwargs):
        self._began, self._first_step = time.monotonic(), state.global_step
        if sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            line = (
                f"step {state.global_step:>5}/{state.max_steps}  loss {logs['loss']:.4f}  nll {logs['nll']:.4f}  "
                f"accuracy {logs['accuracy']:.1%}  grad_norm {logs.get('grad_norm', 0.0):.2f}  "
                f"lr {logs['learning_rate']:.2e}  {logs['tokens_per_second']:,.0f} tokens/s"
                f"{'  mfu {:.1%}'.format(logs['mfu']) if 'mfu' in logs else ''}  {self._times(state)}"
            )
        elif "eval_nll" in logs:
            line = (
                f"step {state.global_step:>5}/{state.max_steps}  held out: eval_nll {logs['eval_nll']:.4f}  "
                f"accuracy {logs['eval_accuracy']:.1%}  over {logs['eval_label_tokens']:,} label tokens"
            )
            if "eval_ece_equal_mass" in logs:
                line += "  " + ", ".join(said({key.removeprefix("eval_"): value for key, value in logs.items()})[:2])
        else:
            return
        self.training_bar.write(line) if self.training_bar is not None else print(line, flush=True)

    def _times(self, state) -> str:
        """Return the time since this start of the run began to train, and what remains at the speed so far."""
        passed = time.monotonic() - self._began
        done = state.global_step - self._first_step
        remains = passed / done * (state.max_steps - state.global_step) if done else math.inf
        left = f", {whole_seconds(remains)} left" if math.isfinite(remains) else ""
        return f"{whole_seconds(passed)} elapsed{left}"


def whole_seconds(seconds: float) -> str:
    """Return a time as people write it: 0:05:40."""
    return str(timedelta(seconds=round(seconds)))
