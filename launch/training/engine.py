"""What is changed in Trainer's engine and state once DeepSpeed has made the one and a checkpoint is loaded."""

from pathlib import Path

from transformers import Trainer, TrainerCallback

from launch.common.library_patches import (
    consolidate_buffers,
    find_infinities_by_norm,
    follow_this_schedule,
    keep_flat_weights,
    keep_fp32_grad_norm,
    place_step_counts,
)
from launch.common.paths import CHECKPOINT
from launch.config.deepspeed_file import offloads_optimizer
from launch.data.sampler import EpochSampler
from launch.model.tensor_parallel.apply import finish_adapters
from launch.process.ranks import from_main


def what_training_waits_for(config: dict) -> str:
    """Return what goes on before the first step is told, for the log."""
    waits = "setting up DeepSpeed and the optimizer; the first step finds memory, and on a GPU compiles kernels"
    if "optimizer" in config and offloads_optimizer(config):
        waits += (
            "\nDeepSpeed may compile the optimizer of its configuration for the CPU, once, some minutes; if nothing "
            "goes on then, an interrupted compilation has left a file named lock below ~/.cache/torch_extensions: "
            "remove it"
        )
    return waits


class EngineReady(TrainerCallback):
    """Applies fixes to the engine, and after a resume to optimizer, LR schedule and state.

    Collectives: one broadcast of an object when training begins, if a best step is known.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        engine = self.trainer.deepspeed
        consolidate_buffers(engine)
        if engine.zero_optimization_stage() == 0:
            keep_fp32_grad_norm(engine)
        find_infinities_by_norm(engine)
        keep_flat_weights(engine)
        finish_adapters(engine.module)
        if state.global_step:  # a checkpoint was loaded
            place_step_counts(engine.basic_optimizer)
            schedule = self.trainer.lr_scheduler
            follow_this_schedule(getattr(schedule, "scheduler", schedule), self.trainer.optimizer)  # if wrapped
        if state.best_global_step:  # in this directory, even if the run was copied from another one
            best = Path(args.output_dir) / CHECKPOINT.format(step=state.best_global_step)
            state.best_model_checkpoint = str(best) if from_main(best.exists) else None


class SamplerEpoch(TrainerCallback):
    """Tells a sampler which epoch begins: Trainer does not reach it through what skips batches on several ranks."""

    def __init__(self, sampler: EpochSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch))
