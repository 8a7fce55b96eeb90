"""The private methods of `transformers.Trainer` that are overridden, since no public hook does the same.

Seen with transformers 5.24. `tests/launch/common/test_library_patches.py` fails once Trainer has no such method, or
does what an override is for. Other patches of libraries: `launch.common.library_patches`.
"""

from contextlib import AbstractContextManager
from pathlib import Path

from torch.utils.data import Sampler
from transformers import Trainer

from launch.model.adapters import is_adapted
from launch.training.trained_weights import trained_weights


class TrainerWithHooks(Trainer):
    """A Trainer with a sampler of its own, checkpoints written elsewhere first, and a look at the best one."""

    def __init__(self, *args, sampler: Sampler | None, **kwargs):
        super().__init__(*args, **kwargs)
        self.sampler = sampler
        self._aside: Path | None = None

    def checkpoint_aside(self) -> AbstractContextManager[Path]:
        """Enter to get the directory that Trainer is to write a `checkpoint-N` into; on leaving it is complete."""
        raise NotImplementedError

    def check_best(self, checkpoint: Path) -> None:
        """Raise if the best checkpoint cannot be loaded."""
        raise NotImplementedError

    def _get_train_sampler(self, train_dataset=None):
        """Use `sampler`, if there is one.

        Trainer's own repeats rows where they do not divide over the ranks, and for --train_sampling_strategy
        group_by_length draws from the process's random generator, which is in another state after a resume and on
        other ranks. `get_train_dataloader` is public, but to override it
        would be to copy the private `_get_dataloader`. Upstream: huggingface/transformers#48025 fixed the same for
        evaluations. Test: `test_trainers_sampler_draws_from_the_global_generator`.
        """
        return super()._get_train_sampler(train_dataset) if self.sampler is None else self.sampler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write an adapter without gathering, or copying, the frozen model to the first rank.

        Trainer leaves that out under ZeRO 3 alone. Upstream: none found. Test: `test_trainer_gathers_frozen_weights`.
        """
        if is_adapted(self.model):
            self._save(output_dir, state_dict=trained_weights(self.deepspeed))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial) -> None:
        """Write into another directory than the run's, under `checkpoint_aside`.

        Trainer writes file after file into the final directory, so a kill leaves half a checkpoint under its name.
        `on_save` comes too late. Upstream: huggingface/transformers#27820 wrote to a temporary directory, and was
        taken back. Test: `test_trainer_writes_checkpoints_in_place`.
        """
        try:
            with self.checkpoint_aside() as self._aside:
                super()._save_checkpoint(model, trial)
        finally:
            self._aside = None

    def _get_output_dir(self, trial) -> str:
        """See `_save_checkpoint`; changing `args.output_dir` instead would put it into `training_args.bin`."""
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _load_best_model(self) -> None:
        """Check the best checkpoint before it is loaded. Test: `test_trainer_loads_the_best_checkpoint_unchecked`."""
        self.check_best(Path(self.state.best_model_checkpoint))
        super()._load_best_model()
