"""deepspeed launch/sft.py --smoothing 0.1

Fine-tunes a causal LM with a label-smoothed cross entropy whose vocabulary is sharded over tensor-parallel ranks.
`python launch/sft.py --preview 20` shows what is learned of its data, `--sanity` checks the same run on one device;
`--help` lists every flag.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

# The launcher puts launch/ first on the path, where its modules would shadow others of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.config.early import end_on_mistake
from launch.process.place import take_place

if __name__ == "__main__":
    end_on_mistake(sys.argv[1:], take_place)

from launch.process.environment import keep_quiet, share_cores
from launch.process.launcher import follow_launcher

follow_launcher()
share_cores()
keep_quiet()

from launch.common.library_patches import load_weights_only, skip_shared_memory_op

skip_shared_memory_op()
load_weights_only()

from transformers import TrainerCallback

from launch.assemble import make_trainer, training_arguments
from launch.common.atomic_files import write_whole
from launch.common.errors import UserError
from launch.common.paths import DROPPED, MODEL
from launch.config.command_line import parse_options
from launch.config.recipe import resolved
from launch.data.load import load_data
from launch.data.preview.run import preview
from launch.data.records import DropReport
from launch.preflight.checks import check_run
from launch.process.exit import run_to_its_end
from launch.process.ranks import ensure_environment, from_main, say, say_log
from launch.process.signals import Stopped
from launch.process.startup_errors import StartupErrors
from launch.process.watchdog import Watchdog
from launch.reporting.about import write_about
from launch.reporting.model_card import model_card
from launch.reporting.write import report_at_the_end
from launch.run.checkpoints import reading
from launch.run.directory import Run, open_run
from launch.run.layout import layout
from launch.run.started import first_day
from launch.training.beginning import begin_as_rows
from launch.training.engine import what_training_waits_for
from launch.training.export import export
from launch.training.generation import stop_generation
from launch.training.next_steps import next_steps
from launch.training.samples import write_samples
from launch.training.trainer import SftTrainer


def main(argv: list[str], callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Run as the flags say. `callbacks`: of the Trainer, besides the run's own."""
    options, training_values = parse_options(argv)
    ensure_environment()
    say_log("smoothing")
    if options.sanity:
        sys.exit(check_run(options, training_values))
    if options.preview:
        return preview(options, training_values, first_day(training_values.get("output_dir")))
    options, args = training_arguments(options, training_values)
    day = from_main(lambda: first_day(training_values.get("output_dir")))
    tokenizer, data = load_data(options, day)
    recipe = resolved(options, args, training_values.get("deepspeed"))
    facts = layout(options, args, data)
    run = open_run(training_values.get("output_dir"), recipe, args.resume_from_checkpoint, facts, day)
    if run.finished:
        say(f"{run.path} is finished: its model is in {run.path / MODEL}; a larger --max_steps would train further")
        return
    say(f"run: {run.path}")
    if data.streaming is None:
        name_dropped(data.report, run.path / DROPPED)
    from_main(lambda: write_about(run.path, data, tokenizer, args.seed))
    with Watchdog(options.stall_timeout) as watchdog:
        with StartupErrors(run.path) as starting:
            trainer = make_trainer(options, args, tokenizer, data, run, facts, watchdog, starting, callbacks)
            train(trainer, run)
        stop_generation(trainer.model, tokenizer, data.summary.stops)
        begin_as_rows(tokenizer, data.summary.formats, data.train)
        write_samples(trainer, tokenizer, data.heldout, options.samples)
        watchdog.beat("exporting the model", storage=True)
        if reason := trainer.best_not_exported():
            say(reason)
        card = model_card(trainer, tokenizer, data, options)
        model = export(trainer, tokenizer, args.output_dir, options.smoothing, card, options.merge_adapter)
        say(f"model: {model}")
        adapter = options.lora_rank > 0 and not options.merge_adapter
        say(next_steps(run.path, model, trainer.state.global_step, adapter, options.load_in_4bit))
    if not options.no_report:  # no rank waits any more
        report_at_the_end(run.path)


def train(trainer: SftTrainer, run: Run) -> None:
    """Train to the end. Raises `Stopped` after a signal, with a checkpoint written."""
    say(what_training_waits_for(trainer.args.hf_deepspeed_config.config))
    with trainer.milestones.stop as stop, reading(run.checkpoint):
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    if run.converted:
        from_main(lambda: shutil.rmtree(run.checkpoint))
    check_progress(trainer, run)
    step = trainer.state.global_step
    if stop.signal and (step < trainer.state.max_steps or trainer.milestones.evaluation_owed):
        raise Stopped(
            stop.signal, f"stopped after step {step}; the same command with --output_dir {run.path} resumes the run"
        )


def check_progress(trainer: SftTrainer, run: Run) -> None:
    """Raise `UserError` if there was nothing to train, or the run was past its end already."""
    step, last = trainer.state.global_step, trainer.state.max_steps
    if step == 0:
        raise UserError("no step was made: there are fewer rows than a step takes (--dataloader_drop_last)")
    if step > last:
        raise UserError(f"{run.checkpoint} is past --max_steps {last}; raise it, or name another --output_dir")


def name_dropped(report: DropReport, file: Path) -> None:
    """Write every row that was dropped or shortened to a file of the run."""
    from_main(lambda: write_whole(file, report.lines()))
    if len(report):
        say(f"  every dropped row is named in {file}")


if __name__ == "__main__":
    run_to_its_end(main, sys.argv[1:])
