"""Values of `transformers.TrainingArguments` that it takes without a word and that no run can be made of."""

import json
import math
from collections.abc import Callable

from launch.common.errors import UserError

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


def check_values(values: dict) -> None:
    """Raise `UserError` for flags that no run can be made of; of one that was not given nothing is said."""
    for name, (holds, words) in RANGES.items():
        if (value := values.get(name)) is not None and not holds(value):
            raise UserError(f"--{name} must be {words}, got {value}")
    for name in NOT_WITH_DEEPSPEED:
        if values.get(name):
            raise UserError(f"--{name} is not for these runs; ranks share a model by --tp and --zero")
    for name in NOT_RESUMABLE:
        if values.get(name):
            raise UserError(
                f"--{name} is not for these runs: one that goes on from a checkpoint would take another course"
            )
    for name, value in values.items():
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                json.loads(value)
            except (ValueError, RecursionError) as fault:
                raise UserError(f"--{name} is not JSON: {fault}") from None
    metric = values.get("metric_for_best_model")
    if metric is not None and f"eval_{metric.removeprefix('eval_')}" not in BEST_METRICS:
        raise UserError(f"--metric_for_best_model must be one of {', '.join(BEST_METRICS)}, got {metric!r}")
    steps, epochs = values.get("max_steps", -1), values.get("num_train_epochs", 1.0)
    if steps == 0 or steps < -1:
        raise UserError(f"--max_steps must be at least 1, got {steps}; leave it out for --num_train_epochs")
    if steps < 0 and not 0 < epochs < math.inf:
        raise UserError(f"--num_train_epochs must be a finite number above 0, got {epochs}")


def check_loss_scale(fp16: bool, zero: int) -> None:
    if fp16 and zero == 0:
        raise UserError(
            "--fp16 needs --zero 1 or more: without ZeRO DeepSpeed divides gradients by a loss scale that it never "
            "multiplied the loss with"
        )
