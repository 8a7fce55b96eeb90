"""What is put right of an optimizer and a schedule once a checkpoint has been loaded into them."""

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def place_step_counts(optimizer: Optimizer) -> None:
    """A fused optimizer's counts of steps go where their parameters are.

    DeepSpeed leaves those of a universal checkpoint on the CPU.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            state = optimizer.state[parameter]
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(parameter.device)


def follow_this_schedule(schedule: LRScheduler, optimizer: Optimizer) -> None:
    """The next learning rate is by this run's schedule: the saved one may be of a schedule with another end."""
    if not isinstance(schedule, LambdaLR):
        return
    pairs = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    schedule._last_lr = [base * at(schedule.last_epoch) for base, at in pairs]
    for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate
