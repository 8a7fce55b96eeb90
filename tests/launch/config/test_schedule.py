"""A schedule or an optimizer that cannot be made is told before data and model are loaded."""

import pytest

from launch.common.errors import UserError
from launch.config.early import flags
from launch.config.schedule import check_schedule
from launch.config.training_arguments import SftTrainingArguments

NEEDED = {
    "cosine_with_min_lr": {"min_lr": 1e-6},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-6},
    "warmup_stable_decay": {"num_decay_steps": 10},
}


def check(folder, **values) -> None:
    check_schedule(SftTrainingArguments(output_dir=str(folder), use_cpu=True, **values))


@pytest.mark.parametrize("name", flags()["lr_scheduler_type"].values)
def test_every_schedule_can_be_made_with_what_it_needs(tmp_path, name):
    check(tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs=NEEDED.get(name))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"lr_scheduler_kwargs": {"foo": 1}},
            "cosine with --lr_scheduler_kwargs {'foo': 1} cannot be made: TypeError: ",
        ),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr cannot be made: ValueError: One of min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "warmup_stable_decay cannot be made: TypeError: "),
        ({"optim": "schedule_free_adamw"}, "--optim schedule_free_adamw: .*schedulefree"),
    ],
)
def test_what_cannot_be_made(tmp_path, values, words):
    with pytest.raises(UserError, match=words):
        check(tmp_path, **values)
