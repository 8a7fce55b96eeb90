"""`transformers.TrainingArguments` with this project's defaults."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from launch.config.limits import NEVER_USED, NOT_RESUMABLE, NOT_WITH_DEEPSPEED, REFUSED

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
    "resume_from_checkpoint": "Checkpoint, or run with checkpoints, to start from where --output_dir has none.",
}
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
