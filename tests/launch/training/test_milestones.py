"""What is done after each step: a line of the log, an evaluation, a checkpoint; after a signal only the last."""

from types import SimpleNamespace

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from launch.training.milestones import Milestones
from launch.training.trainer import SftTrainer

STEPS_AN_EPOCH, MAX_STEPS = 5, 12


def due(step: int, signal: int = 0, **strategies) -> tuple[str, bool]:
    """What is due after this step, as letters, and whether an evaluation is owed."""
    defaults = {"logging_strategy": "no", "eval_strategy": "no", "save_strategy": "no", "report_to": []}
    args = TrainingArguments("unused", **defaults | strategies)
    state = TrainerState(
        global_step=step,
        max_steps=MAX_STEPS,
        epoch=step / STEPS_AN_EPOCH,
        logging_steps=3,
        eval_steps=4,
        save_steps=5,
    )
    control = TrainerControl()
    milestones = Milestones(SimpleNamespace(agree=lambda: signal))
    for callback in (DefaultFlowCallback(), milestones):
        callback.on_step_end(args, state, control)
    found = (control.should_log * "L") + (control.should_evaluate * "E") + (control.should_save * "S")
    for callback in (DefaultFlowCallback(), milestones):
        callback.on_epoch_end(args, state, control)
    assert not (control.should_log or control.should_evaluate or control.should_save)
    assert control.should_training_stop == (step == MAX_STEPS or signal > 0)
    return found, milestones.evaluation_owed


@pytest.mark.parametrize(
    ("step", "strategies", "expected"),
    [
        (3, {"logging_strategy": "steps"}, "L"),
        (4, {"logging_strategy": "steps", "eval_strategy": "steps"}, "E"),
        (5, {"save_strategy": "steps"}, "LS"),
        (5, {"save_strategy": "epoch"}, "LS"),
        (5, {"eval_strategy": "epoch", "save_strategy": "steps"}, "LES"),
        (5, {"logging_strategy": "epoch"}, "L"),
        (6, {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}, ""),
        (12, {"eval_strategy": "epoch", "save_strategy": "epoch"}, "LES"),
        (12, {"eval_strategy": "steps", "save_strategy": "steps"}, "LES"),
        (4, {"eval_strategy": "steps", "save_strategy": "best"}, "LE"),
    ],
)
def test_due(step, strategies, expected):
    assert due(step, **strategies) == (expected, False)


@pytest.mark.parametrize(
    ("step", "strategies", "owed"),
    [
        (3, {"eval_strategy": "epoch"}, False),
        (3, {"eval_strategy": "steps"}, False),
        (4, {"eval_strategy": "steps"}, True),
        (5, {"eval_strategy": "epoch"}, True),
    ],
)
def test_a_signal_leaves_a_checkpoint_and_owes_what_was_due(step, strategies, owed):
    assert due(step, signal=15, **strategies) == ("LS", owed)


def test_a_signal_in_the_last_step_changes_nothing():
    assert due(12, signal=15, eval_strategy="epoch") == ("LES", False)


@pytest.mark.parametrize("saved", [True, False])
def test_a_cut_evaluation_leaves_one_checkpoint(saved):
    """Trainer saves it at once, or with --save_strategy best not at all: then it is due at the end of the epoch."""
    milestones, control = Milestones(None), TrainerControl()
    milestones.cut_evaluation(control)
    assert control.should_save and control.should_training_stop and milestones.evaluation_owed
    if saved:
        milestones.on_save(None, None, control)
    milestones.on_epoch_end(None, None, control)
    assert control.should_save is not saved


def test_a_run_resumed_at_its_end_makes_no_step():
    control = TrainerControl()
    Milestones(None).on_epoch_begin(None, TrainerState(global_step=12, max_steps=12), control)
    trainer = SftTrainer.__new__(SftTrainer)
    trainer.control = control
    assert trainer.get_batch_samples(iter([{}]), 1, None) == ([], None)


def test_milestones_must_be_the_last_callback():
    class Late(TrainerCallback):
        pass

    trainer = SftTrainer.__new__(SftTrainer)
    trainer.milestones = Milestones(None)
    trainer.callback_handler = SimpleNamespace(callbacks=[trainer.milestones, Late()])
    with pytest.raises(RuntimeError, match=r"Milestones must be the last callback.* Late was added after it"):
        trainer.train()
