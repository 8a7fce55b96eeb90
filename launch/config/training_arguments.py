"""`transformers.TrainingArguments` with this project's defaults, and what no run can be made of.

transformers accepts those values silently, and fails, or trains wrongly, with them.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from launch.common.errors import UserError

# the arguments that `--help` lists; `--help-all` lists the others with the help of transformers
HELP = {
    "output_dir": "Directory of the run; the same command resumes there (default: the next number in runs/).",
    "learning_rate": "Peak learning rate.",
    "lr_scheduler_type": "Shape of the learning rate after warmup: cosine, linear, constant_with_warmup, ...",
    "warmup_steps": "Steps of linear warmup; below 1: a share of all steps.",
    "num_train_epochs": "Passes over the training rows.",
    "max_steps": "Steps to train instead of --num_train_epochs.",
    "per_device_train_batch_size": "Rows in a micro-batch of one data-parallel rank.",
    "gradient_accumulation_steps": "Micro-batches in a step.",
    "bf16": "Train in bfloat16, with an fp32 optimizer.",
    "gradient_checkpointing": "Recompute activations in the backward pass: less memory, more time.",
    "eval_strategy": "When to evaluate: no, steps (every --eval_steps) or epoch.",
    "eval_steps": "Steps between evaluations (default: --logging_steps); below 1: a share of all steps.",
    "save_steps": "Steps between checkpoints; below 1: a share of all steps.",
    "logging_steps": "Steps between lines of the log and of metrics.jsonl.",
    "report_to": "Trackers to report to: tensorboard, wandb, ...",
    "seed": "Seed of the order of rows, of dropout and of random weights.",
    "deepspeed": "DeepSpeed file of your own instead of --zero and --offload.",
    "resume_from_checkpoint": "Checkpoint to start from where --output_dir has none.",
}
REFUSED = {
    "label_smoothing_factor": (
        "--smoothing is the only smoothing knob: label_smoothing_factor makes transformers.Trainer smooth the logits "
        "it sees, which under tensor parallelism are one rank's share of the vocabulary (an index error, or silently "
        "a wrong loss)"
    ),
    "save_only_model": "no run could resume from such checkpoints; the model is exported at the end",
    "ddp_timeout": "use --stall_timeout, the seconds without progress after which a run stops",
}
Holds = Callable[[float], bool]
POSITIVE: tuple[Holds, str] = (lambda x: 0 < x < math.inf, "a finite number above 0")
NOT_NEGATIVE: tuple[Holds, str] = (lambda x: 0 <= x < math.inf, "a finite number of at least 0")
AT_LEAST_1: tuple[Holds, str] = (lambda x: x >= 1, "at least 1")
BELOW_1: tuple[Holds, str] = (lambda x: 0 <= x < 1, "at least 0 and below 1")

RANGES = {
    "learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": BELOW_1,
    "adam_beta2": BELOW_1,
    "adam_epsilon": POSITIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "neftune_noise_alpha": NOT_NEGATIVE,
    "per_device_train_batch_size": AT_LEAST_1,
    "per_device_eval_batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "eval_accumulation_steps": AT_LEAST_1,
    "logging_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "save_steps": POSITIVE,
    "seed": (lambda x: 0 <= x < 2**32, "at least 0 and below 2^32"),
    "data_seed": (lambda x: 0 <= x < 2**32, "at least 0 and below 2^32"),
    "dataloader_num_workers": NOT_NEGATIVE,
}
NOT_RESUMABLE = ("dataloader_persistent_workers", "ignore_data_skip")
BEST_METRICS = ("eval_nll", "eval_accuracy")
# what would do the work of --tp and --zero beside them, or needs what no run here has
NOT_WITH_DEEPSPEED = ("fsdp", "fsdp_config", "parallelism_config", "push_to_hub")
NEVER_USED = ("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision")
HIDDEN = {*REFUSED, *NOT_WITH_DEEPSPEED, *NOT_RESUMABLE, *NEVER_USED, "local_rank"}  # from every help


@dataclass
class SftTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with this recipe's defaults."""

    _argument_group_name = "training (most used of transformers.TrainingArguments; --help-all lists the rest)"

    output_dir: str | None = None
    learning_rate: float = 1e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    max_grad_norm: float = 1.0
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 8
    logging_steps: float = 10
    eval_strategy: str = "epoch"
    eval_on_start: bool = True
    save_strategy: str = "steps"
    save_steps: float = 0.1  # of all steps
    save_total_limit: int | None = 2
    report_to: str | list[str] = "none"
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    prediction_loss_only: bool = True
    remove_unused_columns: bool = False  # the collator keeps what the model takes, and `where`
    average_tokens_across_devices: bool = True
    metric_for_best_model: str | None = "eval_nll"
    greater_is_better: bool | None = None

    def __post_init__(self) -> None:
        if self.greater_is_better is None:  # transformers derives it from the name: true for anything but a "loss"
            self.greater_is_better = "accuracy" in (self.metric_for_best_model or "")
        super().__post_init__()


def check_values(values: dict[str, Any]) -> None:
    """Raise `UserError` for values that no run can be made of. `values` holds only what was given."""
    for name, (holds, words) in RANGES.items():
        if (value := values.get(name)) is not None and not holds(value):
            raise UserError(f"--{name} must be {words}, got {value}")
    for name in NOT_WITH_DEEPSPEED:
        if values.get(name):
            raise UserError(f"--{name} is not supported: ranks share a model by --tp and --zero; nothing is uploaded")
    for name in NOT_RESUMABLE:
        if values.get(name):
            raise UserError(f"--{name} is not supported: a resumed run would read different rows")
    for name, value in values.items():
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                json.loads(value)
            except (ValueError, RecursionError) as error:
                raise UserError(f"--{name} is not JSON: {error}") from None
    metric = values.get("metric_for_best_model")
    if metric is not None and f"eval_{metric.removeprefix('eval_')}" not in BEST_METRICS:
        raise UserError(f"--metric_for_best_model must be one of {', '.join(BEST_METRICS)}, got {metric!r}")
    steps, epochs = values.get("max_steps", -1), values.get("num_train_epochs", 1.0)
    if steps == 0 or steps < -1:
        raise UserError(f"--max_steps must be at least 1, got {steps}; leave it out for --num_train_epochs")
    if steps < 0 and not 0 < epochs < math.inf:
        raise UserError(f"--num_train_epochs must be a finite number above 0, got {epochs}")


def check_loss_scale(fp16: bool, zero: int) -> None:
    """Raise `UserError` for fp16 without ZeRO."""
    if fp16 and zero == 0:
        raise UserError(
            "--fp16 needs --zero 1 or more: without ZeRO DeepSpeed divides gradients by a loss scale that it never "
            "multiplied the loss with"
        )
