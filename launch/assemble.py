"""From a run's options to its `TrainingArguments` and its Trainer."""

import datasets
import torch
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from launch.common.errors import UserError
from launch.common.paths import RUNS
from launch.config.deepspeed import deepspeed_config
from launch.config.options import SftOptions
from launch.config.training_arguments import SftTrainingArguments, check_loss_scale
from launch.data.batches import PadToLongest
from launch.data.blank_rows import fill_to_multiple
from launch.data.prepared import EncodedData
from launch.data.sampler import EpochSampler, grouped_by_length, in_order, shuffled
from launch.model.load import load_model
from launch.process.device import uses_gpu
from launch.process.ranks import say, world_size
from launch.process.rendezvous import rendezvous
from launch.process.signals import StopOnSignal
from launch.process.startup_errors import StartupErrors
from launch.process.watchdog import Watchdog
from launch.run.directory import Run
from launch.training.engine import EngineReady, SamplerEpoch
from launch.training.logging import MetricsFile, Progress, ResolvedDeepSpeed
from launch.training.milestones import Milestones
from launch.training.nonfinite import NonFiniteSteps
from launch.training.trainer import SftTrainer
from smoothing.hf import SmoothedLossCallback


def training_arguments(options: SftOptions, values: dict) -> tuple[SftOptions, SftTrainingArguments]:
    """The options, and `TrainingArguments` with the DeepSpeed configuration in them; starts the process group."""
    options, config = deepspeed_config(options, values.get("deepspeed"), world_size())
    check_loss_scale(values.get("fp16", False), config["zero_optimization"]["stage"])
    defaults = {"use_cpu": not uses_gpu(), "output_dir": str(RUNS)}
    try:
        with rendezvous():
            args = SftTrainingArguments(**(defaults | values | {"deepspeed": config}))
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise UserError(str(error)) from None
    check_arguments(args)
    say(
        f"{args.world_size} process(es) on {args.device.type}, tensor parallelism {options.tp}, "
        f"ZeRO {config['zero_optimization']['stage']}, smoothing {options.smoothing:g}, {options.head} head"
    )
    return options, args


def check_arguments(args: SftTrainingArguments) -> None:
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
    if args.use_cpu and uses_gpu():
        raise UserError("--use_cpu: DeepSpeed would be on the GPU; set the environment variable DS_ACCELERATOR=cpu")
    if args.fp16 and not get_accelerator().is_fp16_supported():
        raise UserError(f"--fp16 is not supported on {args.device.type}; leave it out, or try --bf16 true")


def make_trainer(
    options: SftOptions,
    args: SftTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    data: EncodedData,
    run: Run,
    facts: dict,
    watchdog: Watchdog,
    starting: StartupErrors,
) -> SftTrainer:
    """Make a Trainer of the model; its loss is installed once DeepSpeed has sharded the model."""
    args.output_dir = str(run.path)
    if run.checkpoint is not None:
        args.eval_on_start = run.evaluation_owed
    if run.converted:
        args.hf_deepspeed_config.config["checkpoint"] = {"load_universal": True}
    data_parallel = args.world_size // options.tp
    heldout = fill_to_multiple(data.heldout, data_parallel * args.per_device_eval_batch_size, tokenizer.eos_token_id)
    if not len(heldout):
        if args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST:
            raise UserError("the best checkpoint is chosen by held-out rows, and there are none; give --eval_data")
        args.eval_strategy, args.eval_on_start, heldout = "no", False, None
    train, sampler = train_split(args, data.train, facts["rows_a_step"], data_parallel, tokenizer.eos_token_id)
    keep, args.save_total_limit = args.save_total_limit, None
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    trainer = SftTrainer(
        model=load_model(options, tokenizer, dtype, args.seed),
        args=args,
        train_dataset=train,
        eval_dataset=heldout,
        data_collator=PadToLongest(tokenizer.pad_token_id),
        processing_class=tokenizer,
        nonfinite=NonFiniteSteps(options.on_nonfinite),
        watchdog=watchdog,
        milestones=Milestones(StopOnSignal()),
        facts=facts,
        keep=keep,
        sampler=sampler,
    )
    add_callbacks(trainer, options, starting)
    return trainer


def train_split(
    args: SftTrainingArguments, rows: datasets.Dataset, rows_a_step: int, data_parallel: int, token_id: int
) -> tuple[datasets.Dataset, EpochSampler]:
    """Return the rows to train on, with blank rows at their end, and the order in which an epoch takes them.

    Each row is taken once an epoch, in the same step whatever the number of ranks. With --dataloader_drop_last the
    rows that would not fill an epoch's last step are left out, and no blank rows are needed.
    """
    if args.train_sampling_strategy == "group_by_length":
        order = grouped_by_length(list(rows["length"]), rows_a_step)
    else:
        order = in_order(len(rows)) if args.train_sampling_strategy == "sequential" else shuffled(len(rows))
    seed = args.seed if args.data_seed is None else args.data_seed
    if args.dataloader_drop_last:
        return rows, EpochSampler(order, len(rows) - len(rows) % rows_a_step, range(0), seed)
    filled = fill_to_multiple(rows, data_parallel * args.per_device_train_batch_size, token_id)
    return filled, EpochSampler(order, len(rows), range(len(rows), len(filled)), seed)


def add_callbacks(trainer: SftTrainer, options: SftOptions, starting: StartupErrors) -> None:
    """Add all callbacks. The order of those before `milestones` does not matter; Trainer's own are the first."""
    for unused in (ProgressCallback, PrinterCallback):
        trainer.pop_callback(unused)
    loss = {"label_smoothing": options.smoothing, "head": options.head, "chunk_bytes": options.chunk_bytes}
    callbacks = [
        EngineReady(trainer),
        SmoothedLossCallback(**loss, on_stats=trainer.count, logits_in_eval=False),
        trainer.watchdog,
        starting,
        Progress(),
        MetricsFile(),
        ResolvedDeepSpeed(),
        *([SamplerEpoch(trainer.sampler)] if isinstance(trainer.sampler, EpochSampler) else []),
        trainer.milestones,
    ]
    for callback in callbacks:
        trainer.add_callback(callback)
