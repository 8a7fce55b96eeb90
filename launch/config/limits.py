"""Training arguments of which no run can be made: refused ones, and values out of their range.

transformers accepts those values silently, and fails, or trains wrongly, with them.
"""

import json
import math
from collections.abc import Callable
from typing import Any

from launch.common.errors import UserError

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
