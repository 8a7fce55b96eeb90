"""Whether transformers can make the optimizer and the schedule that a run asks for, before anything is loaded."""

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from launch.common.errors import UserError
from launch.common.messages import typed_error_line

STEPS = 100  # of a run whose number of steps is not known yet


def check_schedule(args: TrainingArguments) -> None:
    """Raise `UserError` if a package is missing for one, or a keyword argument is missing or wrong."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise UserError(f"--optim {args.optim.value}: {error}") from None
    except ValueError:  # some want the model for it
        pass
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    steps = args.max_steps if args.max_steps > 0 else STEPS
    kwargs = args.lr_scheduler_kwargs or {}
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, kwargs)
    except Exception as error:
        given = f" with --lr_scheduler_kwargs {kwargs}" if kwargs else ""
        raise UserError(
            f"--lr_scheduler_type {args.lr_scheduler_type.value}{given} cannot be made: {typed_error_line(error)}"
        ) from None
