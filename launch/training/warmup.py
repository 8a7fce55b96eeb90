"""Whether a run is long enough for its warmup."""

from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainingArguments

WITHOUT = ("constant", "reduce_lr_on_plateau", "greedy")  # schedules that have no warmup


def warmup_problem(args: TrainingArguments, steps: int) -> str | None:
    """Return in a sentence that a run of so many steps is all warmup, or None if it is not."""
    warmup = args.get_warmup_steps(steps)
    if warmup < steps or args.lr_scheduler_type in WITHOUT:
        return None
    largest = args.learning_rate * (steps - 1) / warmup
    return (
        f"all {steps:,} steps of this run are warmup (--warmup_steps {args.warmup_steps:g}): the learning rate ends "
        f"at {largest:.2g}, below --learning_rate {args.learning_rate:g}; lower --warmup_steps, or raise --max_steps"
    )


def rate_problem(args: TrainingArguments, schedule: LRScheduler, steps: int) -> str | None:
    """Return in a sentence that a schedule cannot tell the learning rate that it sets after the last step, or None.

    A polynomial one divides by the steps after the warmup.
    """
    try:
        for rate in schedule.lr_lambdas if isinstance(schedule, LambdaLR) else ():
            rate(steps)
    except ArithmeticError:
        return (
            f"--lr_scheduler_type {args.lr_scheduler_type} has no learning rate at the end of this run of {steps:,} "
            f"steps, all of them warmup (--warmup_steps {args.warmup_steps:g}); lower --warmup_steps, or raise "
            "--max_steps"
        )
    return None
