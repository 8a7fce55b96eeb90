"""A run that is all warmup is told of, one step more is not; a schedule that fails at the end is told beforehand."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType
from transformers.optimization import get_scheduler

from launch.config.training_arguments import SftTrainingArguments
from launch.training.warmup import rate_problem, warmup_problem


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
@pytest.mark.parametrize(("warmup", "steps"), [(5, 5), (5, 6), (6, 5), (0, 1)])
def test_a_schedule_that_would_fail_after_the_last_step_is_told(tmp_path, kind, warmup, steps):
    args = SftTrainingArguments(output_dir=str(tmp_path), use_cpu=True, warmup_steps=warmup, lr_scheduler_type=kind)
    more = {"min_lr": 0.1} if "min_lr" in kind else {}
    more |= {"num_decay_steps": 1} if kind == "warmup_stable_decay" else {}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    try:
        schedule = get_scheduler(kind, optimizer, warmup, steps, scheduler_specific_kwargs=more)
        problem = rate_problem(args, schedule, steps)
        failed = False
        for _ in range(steps if isinstance(schedule, LambdaLR) else 0):  # others wait for a metric
            optimizer.step()
            schedule.step()
    except ZeroDivisionError:
        failed = True
    assert (problem is not None) == failed == (kind == "polynomial" and warmup == steps)
    if problem:
        assert f"run of {steps} steps, all of them warmup (--warmup_steps {warmup})" in problem


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
