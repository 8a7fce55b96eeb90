"""A run that is all warmup is told of; one step more is not."""

import pytest
import torch
from transformers.optimization import get_scheduler

from launch.config.training_arguments import SftTrainingArguments
from launch.training.warmup import warmup_problem

KINDS = ["linear", "cosine", "constant_with_warmup", "polynomial", "constant"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("warmup", "steps"), [(5, 5), (5, 6), (6, 5), (0.03, 1), (0.03, 2), (0.5, 4), (0, 1)])
def test_it_is_told_when_no_step_has_the_full_rate(tmp_path, kind, warmup, steps):
    args = SftTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, warmup_steps=warmup, lr_scheduler_type=kind, learning_rate=0.5
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = get_scheduler(kind, optimizer, args.get_warmup_steps(steps), steps)
    rates = [schedule.get_last_lr()[0]]
    for _ in range(steps - 1):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    problem = warmup_problem(args, steps)
    assert (problem is not None) == (max(rates) < 0.5)
    if problem:
        assert f"all {steps} steps" in problem and f"ends at {max(rates):.2g}, below --learning_rate 0.5" in problem
