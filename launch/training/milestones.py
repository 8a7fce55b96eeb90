"""What is due after a step, in one place: a line of the log, an evaluation, a checkpoint; in that order."""

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from launch.process.signals import StopOnSignal


class Milestones(TrainerCallback):
    """Has the last word on what Trainer does after a step; must be its last callback.

    What is due at an epoch's end is done with the epoch's last step. Trainer would do it after that step's
    checkpoint, where an interruption between the two loses it. Every checkpoint is also a line of the log, so that
    none is cut through the middle of what a line sums up. After a signal there is a checkpoint alone; an evaluation
    that was due is owed (`evaluation_owed`) to whoever goes on.
    """

    def __init__(self, stop: StopOnSignal):
        self.stop = stop
        self.stepped = False  # since this start
        self.evaluation_owed = False

    def on_step_end(self, args, state, control, **kwargs):
        self.stepped = True
        last = state.global_step >= state.max_steps
        if last or float(state.epoch).is_integer():
            control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= state.epoch
            control.should_save |= args.save_strategy == SaveStrategy.EPOCH
        self.evaluation_owed = bool(self.stop.signal and not last and control.should_evaluate)
        if self.stop.signal:
            control.should_evaluate &= last
            control.should_save = control.should_training_stop = True
        best_may_be_saved = control.should_evaluate and args.save_strategy == SaveStrategy.BEST
        control.should_log |= control.should_save or best_may_be_saved
        return control

    def cut_evaluation(self, control):
        """What is due once a signal has ended an evaluation: a checkpoint, which owes the evaluation, and the end."""
        self.evaluation_owed = True
        control.should_save = control.should_training_stop = True
        return control

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_log = control.should_evaluate = control.should_save = False
        return control
