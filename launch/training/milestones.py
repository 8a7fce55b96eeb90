"""What is due after a step, decided in one place: a log line, an evaluation, a checkpoint; in that order."""

import signal

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from launch.process.ranks import say
from launch.process.signals import EvaluationCut, StopOnSignal


class Milestones(TrainerCallback):
    """Overrules what Trainer does after a step; must be its last callback (`SftTrainer.train` checks that).

    What is due at the end of an epoch is done with the epoch's last step. Trainer would do it after that step's
    checkpoint, and an interruption between the two would lose it. Every checkpoint comes with a log line, so that no
    log line sums over steps before and after a checkpoint. After a signal only a checkpoint is written; an
    evaluation that was due then is owed (`evaluation_owed`), and the resumed run starts with it.

    Collectives: one all-reduce between hosts a step, and one a batch of an evaluation (`StopOnSignal.agree`).
    """

    def __init__(self, stop: StopOnSignal):
        self.stop = stop
        self.stepped = False  # in this process
        self.evaluation_owed = False
        self._checkpoint_due = False  # after a cut evaluation

    def on_train_begin(self, args, state, control, **kwargs):
        self.stop.connect()

    def on_epoch_begin(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= state.max_steps  # resumed from the last checkpoint
        return control

    def on_step_end(self, args, state, control, **kwargs):
        self.stepped = True
        if number := self.stop.agree():
            say(f"stopping on {signal.Signals(number).name} after step {state.global_step}: saving a checkpoint")
        last = state.global_step >= state.max_steps
        if last or float(state.epoch).is_integer():
            control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= state.epoch
            control.should_save |= args.save_strategy == SaveStrategy.EPOCH
        self.evaluation_owed = bool(number and not last and control.should_evaluate)
        if number:
            control.should_evaluate &= last
            control.should_save = control.should_training_stop = True
        best_may_be_saved = control.should_evaluate and args.save_strategy == SaveStrategy.BEST
        control.should_log |= control.should_save or best_may_be_saved
        return control

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.stop.agree():
            raise EvaluationCut

    def cut_evaluation(self, control):
        """Set what is due once a signal has ended an evaluation: a checkpoint that owes it, and the end."""
        self.evaluation_owed = self._checkpoint_due = True
        control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args, state, control, **kwargs):
        self._checkpoint_due = False

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_log = control.should_evaluate = False
        control.should_save = self._checkpoint_due  # with --save_strategy best Trainer saves after no cut evaluation
        return control
