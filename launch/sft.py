"""deepspeed launch/sft.py --smoothing 0.1

Fine-tunes a causal LM with a label-smoothed cross entropy whose vocabulary is sharded over tensor-parallel ranks.
`python launch/sft.py --sanity` checks the same run on one device first; `--help` lists every flag.
"""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

# The launcher puts launch/ first on the path, where its modules would shadow others of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.process.environment import keep_quiet, load_weights_only, share_cores, skip_shared_memory_op
from launch.process.launcher import follow_launcher

follow_launcher()
share_cores()
keep_quiet()
skip_shared_memory_op()
load_weights_only()

import torch
from deepspeed.accelerator import get_accelerator
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from launch.common.atomic_files import write_whole
from launch.common.errors import UserError
from launch.config.deepspeed import deepspeed_config
from launch.config.options import SftOptions, SftTrainingArguments, parse_options, resolved
from launch.config.training_arguments import check_loss_scale
from launch.data.batches import PadToLongest
from launch.data.blank_rows import fill_to_multiple
from launch.data.prepare import load_data
from launch.data.records import DropReport
from launch.model.load import load_model
from launch.preflight.checks import check_run
from launch.process.device import uses_gpu
from launch.process.exit import run_to_its_end
from launch.process.ranks import ensure_environment, from_main, is_main, say, say_log, start_alone, world_size
from launch.process.signals import StopOnSignal, Stopped
from launch.process.startup_errors import Starting
from launch.process.watchdog import Watchdog
from launch.run.checkpoints import reading
from launch.run.directory import DROPPED, Run, open_run
from launch.run.layout import layout
from launch.training.export import MODEL, export
from launch.training.logging import MetricsFile, Progress, ResolvedDeepSpeed
from launch.training.milestones import Milestones
from launch.training.nonfinite import NonFiniteSteps
from launch.training.samples import complete, shown
from launch.training.trainer import SftTrainer
from smoothing.hf import SmoothedLossCallback


def main(argv: list[str]) -> None:
    options, training_values = parse_options(argv)
    ensure_environment()
    say_log("smoothing")
    if options.sanity:
        sys.exit(check_run(options, training_values))
    args = training_arguments(options, training_values)
    tokenizer, data = load_data(options)
    recipe = resolved(options, args, training_values.get("deepspeed"))
    facts = layout(options, args, data)
    run = open_run(training_values.get("output_dir"), recipe, args.resume_from_checkpoint, facts)
    if run.finished:
        say(f"{run.path} is finished: its model is in {run.path / MODEL}. To train on, move that away")
        return
    say(f"run: {run.path}")
    name_dropped(data.report, run.path / DROPPED)
    with Watchdog(options.stall_timeout) as watchdog:
        with Starting(run.path) as starting:
            trainer = make_trainer(options, args, tokenizer, data, run, facts, watchdog)
            trainer.add_callback(starting)
            train(trainer, run)
        show_samples(trainer, tokenizer, data.heldout, options.samples)
        watchdog.beat("exporting the model", storage=True)
        say(f"model: {export(trainer, tokenizer, args.output_dir)}")


def train(trainer: SftTrainer, run: Run) -> None:
    """Train to the end. Raises `Stopped` after a signal, with a checkpoint written."""
    with StopOnSignal() as stop:
        trainer.add_callback(stop)
        trainer.add_callback(milestones := Milestones(stop))
        trainer.milestones = milestones
        with reading(run.checkpoint):
            trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    if run.converted:
        from_main(lambda: shutil.rmtree(run.checkpoint))
    check_progress(trainer, run)
    step = trainer.state.global_step
    if stop.signal and (step < trainer.state.max_steps or milestones.evaluation_owed):
        raise Stopped(
            stop.signal, f"stopped after step {step}; the same command with --output_dir {run.path} goes on"
        )


def check_progress(trainer: SftTrainer, run: Run) -> None:
    """Raise `UserError` if there was nothing to train, or the run was past its end already."""
    step, last = trainer.state.global_step, trainer.state.max_steps
    if step == 0:
        raise UserError("not one step was made: there are fewer rows than a step takes (--dataloader_drop_last)")
    if step > last:
        raise UserError(f"{run.checkpoint} is past --max_steps {last}; give more, or name another --output_dir")


def training_arguments(options: SftOptions, values: dict) -> SftTrainingArguments:
    """`TrainingArguments` with the DeepSpeed configuration in them; starts the process group."""
    config = deepspeed_config(options, values.get("deepspeed"), world_size())
    check_loss_scale(values.get("fp16", False), config["zero_optimization"]["stage"])
    start_alone()
    defaults = {"use_cpu": not uses_gpu(), "output_dir": "runs"}
    try:
        args = SftTrainingArguments(**(defaults | values | {"deepspeed": config}))
    except (ValueError, TypeError, ImportError, NotImplementedError) as fault:
        raise UserError(str(fault)) from None
    check_arguments(args)
    say(
        f"{args.world_size} process(es) on {args.device.type}, tensor parallelism {options.tp}, "
        f"ZeRO {config['zero_optimization']['stage']}, smoothing {options.smoothing:g}, {options.head} head"
    )
    return args


def check_arguments(args: SftTrainingArguments) -> None:
    """What would otherwise end in a traceback after data and model are loaded."""
    if args.hf_deepspeed_config.mismatches:
        lines = "\n".join(args.hf_deepspeed_config.mismatches)
        raise UserError(f'the DeepSpeed file says other values than the recipe; set them to "auto" there:\n{lines}')
    if args.save_strategy == SaveStrategy.BEST and args.eval_strategy == IntervalStrategy.NO:
        raise UserError("--save_strategy best needs evaluations, and --eval_strategy is no; nothing would be saved")
    if not args.accelerator_config.use_seedable_sampler:
        raise UserError("--accelerator_config use_seedable_sampler false: a run that goes on would take other rows")
    if args.use_cpu and uses_gpu():
        raise UserError("--use_cpu: DeepSpeed would be on the GPU; set the environment variable DS_ACCELERATOR=cpu")
    if args.fp16 and not get_accelerator().is_fp16_supported():
        raise UserError(f"--fp16 is not supported on {args.device.type}; leave it out, or try --bf16 true")


def name_dropped(report: DropReport, file: Path) -> None:
    """Every row that was dropped or shortened, in a file of the run."""
    from_main(lambda: write_whole(file, report.lines()))
    if len(report):
        say(f"  every dropped row is named in {file}")


def make_trainer(
    options: SftOptions, args: SftTrainingArguments, tokenizer, data, run: Run, facts: dict, watchdog: Watchdog
) -> SftTrainer:
    """The model under the smoothed loss in a Trainer; the loss goes in once DeepSpeed has sharded the model."""
    args.output_dir = str(run.path)
    if run.checkpoint is not None:
        args.eval_on_start = run.evaluation_owed
    if run.converted:
        args.hf_deepspeed_config.config["checkpoint"] = {"load_universal": True}
    data_parallel = args.world_size // options.tp
    heldout = fill_to_multiple(data.heldout, data_parallel * args.per_device_eval_batch_size, tokenizer.eos_token_id)
    if not len(heldout):
        if args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST:
            raise UserError("the best checkpoint is told by held-out rows, and there are none; give --eval_data")
        args.eval_strategy, args.eval_on_start, heldout = "no", False, None
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    trainer = SftTrainer(
        model=load_model(options, tokenizer, dtype, args.seed),
        args=args,
        train_dataset=data.train,
        eval_dataset=heldout,
        data_collator=PadToLongest(tokenizer.pad_token_id),
        processing_class=tokenizer,
        nonfinite=NonFiniteSteps(options.on_nonfinite),
        watchdog=watchdog,
        facts=facts,
    )
    loss = {"label_smoothing": options.smoothing, "head": options.head, "chunk_bytes": options.chunk_bytes}
    trainer.add_callback(SmoothedLossCallback(**loss, on_stats=trainer.count, logits_in_eval=False))
    trainer.pop_callback(ProgressCallback)
    trainer.pop_callback(PrinterCallback)
    trainer.add_callback(Progress())
    trainer.add_callback(MetricsFile())
    trainer.add_callback(ResolvedDeepSpeed())
    return trainer


def show_samples(trainer: SftTrainer, tokenizer, heldout, count: int) -> None:
    rows = heldout.select(range(min(count, len(heldout))))
    beat = partial(trainer.watchdog.beat, "completing samples")
    samples = complete(trainer.model, tokenizer, rows, trainer.args.device, before_each=beat)
    if is_main():
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        write_whole(Path(trainer.args.output_dir) / "samples.jsonl", lines)
    for sample in samples:
        say(shown(sample))


if __name__ == "__main__":
    run_to_its_end(main, sys.argv[1:])
