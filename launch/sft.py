"""deepspeed launch/sft.py --smoothing 0.1

Fine-tunes a causal LM with a label-smoothed cross entropy whose vocabulary is sharded over tensor-parallel ranks.
`python launch/sft.py --sanity` checks the same run on one device first; `--help` lists every flag.
"""

import json
import sys
from pathlib import Path

# The launcher puts launch/ first on the path, where its modules would shadow others of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.preload import keep_quiet, share_cores, skip_shared_memory_op

share_cores()
keep_quiet()
skip_shared_memory_op()

import torch
import yaml
from deepspeed.accelerator import get_accelerator
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from launch.callbacks import MetricsFile, Progress, ResolvedDeepSpeed
from launch.data.blanks import fill_to_multiple
from launch.data.collate import PadToLongest
from launch.deepspeed_config import deepspeed_config
from launch.errors import UserError
from launch.export import export
from launch.model import load_model
from launch.options import SftOptions, SftTrainingArguments, parse_options, resolved
from launch.prepare import load_data
from launch.processes import claim_output_dir, ensure_environment, is_main, leave, say, world_size
from launch.samples import complete, shown
from launch.sanity import check_run
from launch.trainer import SftTrainer
from smoothing.hf import SmoothedLossCallback


def main(argv: list[str]) -> None:
    options, training_values = parse_options(argv)
    ensure_environment()
    if options.sanity:
        sys.exit(check_run(options, training_values))
    args = training_arguments(options, training_values)
    tokenizer, data = load_data(options)
    args.output_dir = claim_output_dir(training_values.get("output_dir"), bool(args.resume_from_checkpoint))
    write_resolved(options, args, training_values.get("deepspeed"))
    trainer = make_trainer(options, args, tokenizer, data)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    show_samples(trainer, tokenizer, data.heldout, options.samples)
    say(f"model: {export(trainer, tokenizer, args.output_dir)}")


def training_arguments(options: SftOptions, values: dict) -> SftTrainingArguments:
    """`TrainingArguments` with the DeepSpeed configuration in them; starts the process group."""
    config = deepspeed_config(options, values.get("deepspeed"), world_size())
    try:
        # without a GPU transformers starts several processes only when it is told that it is on a CPU
        values = {"use_cpu": not torch.cuda.is_available(), "output_dir": "runs"} | values | {"deepspeed": config}
        args = SftTrainingArguments(**values)
    except (ValueError, TypeError) as fault:
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
    if args.fp16 and not get_accelerator().is_fp16_supported():
        raise UserError(f"--fp16 is not supported on {args.device.type}; leave it out, or try --bf16 true")
    checkpoint = args.resume_from_checkpoint
    if checkpoint and not (Path(checkpoint) / "trainer_state.json").is_file():
        raise UserError(f"--resume_from_checkpoint {checkpoint} holds no checkpoint; name a checkpoint-N directory")


def make_trainer(options: SftOptions, args: SftTrainingArguments, tokenizer, data) -> SftTrainer:
    """The model under the smoothed loss in a Trainer; the loss goes in once DeepSpeed has sharded the model."""
    data_parallel = args.world_size // options.tp
    heldout = fill_to_multiple(data.heldout, data_parallel * args.per_device_eval_batch_size, tokenizer.eos_token_id)
    if not len(heldout):
        args.eval_strategy, args.eval_on_start, heldout = "no", False, None
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    trainer = SftTrainer(
        model=load_model(options, tokenizer, dtype, args.seed),
        args=args,
        train_dataset=data.train,
        eval_dataset=heldout,
        data_collator=PadToLongest(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.add_callback(
        SmoothedLossCallback(label_smoothing=options.smoothing, head=options.head, on_stats=trainer.count)
    )
    trainer.pop_callback(ProgressCallback)
    trainer.pop_callback(PrinterCallback)
    trainer.add_callback(Progress())
    trainer.add_callback(MetricsFile())
    trainer.add_callback(ResolvedDeepSpeed())
    return trainer


def write_resolved(options: SftOptions, args: SftTrainingArguments, deepspeed: str | None) -> None:
    """The resolved recipe, beside the run."""
    if is_main():
        text = yaml.safe_dump(resolved(options, args, deepspeed), sort_keys=True)
        (Path(args.output_dir) / "recipe.yaml").write_text(text, encoding="utf-8")
        say(f"run: {args.output_dir}")


def show_samples(trainer: SftTrainer, tokenizer, heldout, count: int) -> None:
    rows = heldout.select(range(min(count, len(heldout))))
    samples = complete(trainer.model, tokenizer, rows, trainer.args.device)
    if is_main():
        with (Path(trainer.args.output_dir) / "samples.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    for sample in samples:
        say(shown(sample))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as fault:
        if is_main():
            print(f"error: {fault}", file=sys.stderr, flush=True)
        sys.exit(2)
    leave()  # not after an exception: another rank may still be in a collective
