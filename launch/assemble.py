"""From a run's options to its `TrainingArguments` and its Trainer."""

from collections.abc import Sequence
from functools import partial

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from launch.common.errors import UserError
from launch.common.messages import counted
from launch.common.paths import RUNS
from launch.config.deepspeed import deepspeed_config
from launch.config.options import SftOptions
from launch.config.precision import accumulate_in_fp32, check_precision
from launch.config.schedule import check_schedule
from launch.config.training_arguments import SftTrainingArguments
from launch.data.batches import PadToLongest
from launch.data.packing import PadPacked
from launch.data.prepared import EncodedData
from launch.data.sampler import EpochSampler
from launch.data.splits import Split, heldout_split, streamed_split, training_split
from launch.data.streamed_rows import Share, StreamedRows
from launch.evaluation.calibration import Calibration
from launch.model.adapters import with_adapter
from launch.model.base_digest import base_digest
from launch.model.four_bit import check_four_bit
from launch.model.load import load_model
from launch.model.packed_rows import packing_problem, takes_bounds
from launch.model.smoothing_prior import check_prior_file, loss_settings, smoothing_prior
from launch.model.tensor_parallel.apply import split_adapters, split_model
from launch.model.tensor_parallel.dropout import check_dropout
from launch.process.device import uses_gpu
from launch.process.ranks import from_main, say, world_size
from launch.process.rendezvous import rendezvous
from launch.process.signals import StopOnSignal
from launch.process.startup_errors import StartupErrors
from launch.process.watchdog import Watchdog
from launch.run.compare import same_base
from launch.run.directory import Run
from launch.training.engine import EngineReady, SamplerEpoch
from launch.training.logging import MetricsFile, Progress, ResolvedDeepSpeed
from launch.training.milestones import Milestones
from launch.training.nonfinite import NonFiniteSteps
from launch.training.packed_rows import PackedRowsApart
from launch.training.stream_report import StreamReport
from launch.training.trainer import SftTrainer
from smoothing.hf import SmoothedLossCallback
from smoothing.install import causal_lm


def training_arguments(options: SftOptions, values: dict) -> tuple[SftOptions, SftTrainingArguments]:
    """The options, and `TrainingArguments` with the DeepSpeed configuration in them; starts the process group."""
    check_prior_file(options, values.get("output_dir"))
    options, config = deepspeed_config(options, values.get("deepspeed"), world_size())
    check_precision(values, config, options.tp)
    check_four_bit(options, config["zero_optimization"]["stage"])
    note = accumulate_in_fp32(values, config)
    defaults = {"use_cpu": not uses_gpu(), "output_dir": str(RUNS)}
    try:
        with rendezvous():
            args = SftTrainingArguments(**(defaults | values | {"deepspeed": config}))
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise UserError(str(error)) from None
    check_arguments(options, args)
    say(
        f"{counted(args.world_size, 'process', 'processes')} on {args.device.type}, tensor parallelism {options.tp}, "
        f"ZeRO {config['zero_optimization']['stage']}, smoothing {options.smoothing:g}, {options.head} head"
    )
    if note:
        say(note)
    return options, args


def check_arguments(options: SftOptions, args: SftTrainingArguments) -> None:
    """Raise `UserError` for what would otherwise fail after data and model are loaded."""
    if args.hf_deepspeed_config.mismatches:
        lines = "\n".join(args.hf_deepspeed_config.mismatches)
        raise UserError(f'the DeepSpeed file has other values than the recipe; set them to "auto" there:\n{lines}')
    if args.save_strategy == SaveStrategy.BEST and args.eval_strategy == IntervalStrategy.NO:
        raise UserError("--save_strategy best needs evaluations, and --eval_strategy is no; nothing would be saved")
    if not args.accelerator_config.use_seedable_sampler:
        raise UserError(
            "--accelerator_config use_seedable_sampler=false is not supported: a resumed run would read different "
            "rows"
        )
    for name in ("split_batches", "dispatch_batches"):
        if getattr(args.accelerator_config, name):
            raise UserError(
                f"--accelerator_config {name}=true is not supported: every rank reads its own micro-batches, of "
                "--per_device_train_batch_size rows"
            )
    if args.train_sampling_strategy == "batch_rebalance":
        raise UserError(
            "--train_sampling_strategy batch_rebalance is not supported: its order depends on the number of ranks, "
            "and it knows no --tp; use group_by_length"
        )
    if options.streaming:
        check_streaming(args)
    if options.packing and args.train_sampling_strategy == "group_by_length":
        raise UserError(
            "--train_sampling_strategy group_by_length does nothing for --packing, whose sequences are all about as "
            "long; give one of them, or --train_sampling_strategy random to override a recipe"
        )
    if args.use_cpu and uses_gpu():
        raise UserError("--use_cpu: DeepSpeed would be on the GPU; set the environment variable DS_ACCELERATOR=cpu")
    if args.fp16 and not get_accelerator().is_fp16_supported():
        raise UserError(f"--fp16 is not supported on {args.device.type}; leave it out, or try --bf16 true")
    check_schedule(args)


def check_streaming(args: SftTrainingArguments) -> None:
    """Raise `UserError` for what cannot go with `--streaming`."""
    if args.max_steps < 1:
        raise UserError("--streaming needs --max_steps: how many rows there are is known only once all are read")
    if args.train_sampling_strategy != "random":
        raise UserError(
            f"--train_sampling_strategy {args.train_sampling_strategy} cannot be used with --streaming; "
            "--shuffle_buffer 0 keeps the order of the data"
        )
    if args.dataloader_num_workers:
        raise UserError(
            "--dataloader_num_workers cannot be used with --streaming, each of them would read all of the data; rows "
            "are tokenised in --data_workers processes"
        )


def make_trainer(
    options: SftOptions,
    args: SftTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    data: EncodedData,
    run: Run,
    facts: dict,
    watchdog: Watchdog,
    starting: StartupErrors,
    more: Sequence[TrainerCallback] = (),
) -> SftTrainer:
    """Make a Trainer of the model; its loss is installed once DeepSpeed has sharded the model.

    `more`: callbacks besides the run's own.
    """
    args.output_dir = str(run.path)
    if run.checkpoint is not None:
        args.eval_on_start = run.evaluation_owed
    if run.converted:
        args.hf_deepspeed_config.config["checkpoint"] = {"load_universal": True}
    data_parallel = args.world_size // options.tp
    token_id, packed_length = tokenizer.eos_token_id, options.max_length if options.packing else None
    at_once = data_parallel * args.per_device_eval_batch_size
    heldout: Split | None = heldout_split(data.heldout, at_once, token_id, packed_length)
    if not len(heldout):
        if args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST:
            raise UserError("the best checkpoint is chosen by held-out rows, and there are none; give --eval_data")
        args.eval_strategy, args.eval_on_start, heldout = "no", False, None
    at_once = data_parallel * args.per_device_train_batch_size
    if data.streaming is None:
        train, sampler = training_split(
            data.train, args, facts["rows_a_step"], at_once, token_id, packed_length, data.sources, data.weights
        )
    else:
        share = Share(args.process_index // options.tp, data_parallel, args.per_device_train_batch_size)
        beat = partial(watchdog.beat, "reading rows", storage=True)
        train, sampler = streamed_split(data.streaming, args, share, facts["rows_a_step"], token_id, beat)
    keep, args.save_total_limit = args.save_total_limit, None
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    say(f"model: {f'loading {options.model}' if options.model else 'drawing the weights of a new one'}")
    model = load_model(options, tokenizer, dtype, args.seed)
    prior = smoothing_prior(options, data, tokenizer, model, run.path)
    section = args.hf_deepspeed_config.config.get("tensor_parallel", {})
    split = split_model(model, section) if options.tp > 1 else None
    if split is not None:
        check_dropout(model, split, options.tp)
    if options.lora_rank:
        facts["base"] = from_main(lambda: same_base(run.checkpoint, base_digest(options.model)))
    model = with_adapter(model, options, args.seed)
    if split is not None and options.lora_rank:
        split_adapters(section, split)
    if options.packing and (problem := packing_problem(model)):
        raise UserError(problem)
    pad = PadToLongest(tokenizer.pad_token_id)
    prior = None if prior is None else prior.to(args.device)
    calibration = None
    if options.eval_calibration:
        calibration = Calibration(causal_lm(model), options.smoothing, options.tp, prior)
    trainer = SftTrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=heldout,
        data_collator=PadPacked(pad, takes_bounds(model)) if options.packing else pad,
        processing_class=tokenizer,
        nonfinite=NonFiniteSteps(options.on_nonfinite),
        watchdog=watchdog,
        milestones=Milestones(StopOnSignal()),
        facts=facts,
        keep=keep,
        z_loss=options.z_loss,
        fused_head=options.head == "fused",
        calibration=calibration,
        sampler=sampler,
    )
    add_callbacks(trainer, options, starting, prior, more)
    return trainer


def add_callbacks(
    trainer: SftTrainer,
    options: SftOptions,
    starting: StartupErrors,
    prior: Tensor | None,
    more: Sequence[TrainerCallback] = (),
) -> None:
    """Add all callbacks. The order of those before `milestones` does not matter; Trainer's own are the first."""
    for unused in (ProgressCallback, PrinterCallback):
        trainer.pop_callback(unused)
    loss = loss_settings(options, prior) | {"head": options.head, "chunk_bytes": options.chunk_bytes}
    callbacks = [
        EngineReady(trainer),
        SmoothedLossCallback(**loss, on_stats=trainer.count, logits_in_eval=False),
        trainer.watchdog,
        starting,
        Progress(),
        MetricsFile(trainer.calibration),
        ResolvedDeepSpeed(),
        *([SamplerEpoch(trainer.sampler)] if isinstance(trainer.sampler, EpochSampler) else []),
        *([PackedRowsApart(trainer)] if options.packing else []),
        *([StreamReport(rows, options)] if isinstance(rows := trainer.train_dataset, StreamedRows) else []),
        *more,
        trainer.milestones,
    ]
    for callback in callbacks:
        trainer.add_callback(callback)
