"""Packed rows are tried on the model as it is trained, before the first step."""

from transformers import Trainer, TrainerCallback

from launch.common.errors import UserError
from launch.model.packed_rows import distinct_tokens, leak_problem
from launch.process.ranks import on_all_ranks


class PackedRowsApart(TrainerCallback):
    """Refuses a model that attends across packed rows; under tensor parallelism and ZeRO all ranks try together.

    Collectives: those of a few forward passes, and one gather of objects, when training begins.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        tokens = distinct_tokens(trainer.train_dataset[0]["input_ids"], trainer.processing_class)
        name, collate = type(trainer.model).__name__, trainer.data_collator
        problems = on_all_ranks(lambda: leak_problem(trainer.deepspeed, name, collate, tokens, args.device))
        if problem := next(filter(None, problems), None):
            raise UserError(problem)
