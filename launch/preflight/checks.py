"""python launch/sft.py --sanity: check a run on one device before it is started on many."""

import platform
import time

import deepspeed
import torch
import transformers
from torch import Tensor

from launch.common.errors import UserError
from launch.config.deepspeed import deepspeed_config
from launch.config.options import SftOptions
from launch.config.precision import accumulate_in_fp32, check_precision
from launch.config.training_arguments import SftTrainingArguments
from launch.data.batches import PadToLongest
from launch.data.load import load_data
from launch.model.adapters import with_adapter
from launch.model.four_bit import check_four_bit
from launch.model.load import load_model
from launch.model.smoothing_prior import check_prior_file, loss_settings, smoothing_prior
from launch.model.tensor_parallel.apply import has_own_split
from launch.model.tensor_parallel.dropout import check_dropout
from launch.model.tensor_parallel.held_whole import held_whole
from launch.model.tensor_parallel.split import Split, plan_split
from launch.preflight.loss_checks import capture_head_input, check_formulations, check_heads, check_split
from launch.preflight.memory import Setup, estimate
from launch.preflight.model_checks import check_installed, check_mask, check_overfit, check_packed_rows
from launch.preflight.model_split import check_model_split
from launch.preflight.table import Check, show
from launch.process.device import uses_gpu
from launch.process.ranks import say, world_size

MOST_ROWS = 8


def check_run(options: SftOptions, training_values: dict) -> int:
    """Run all checks on this process's device, print the table, and return the exit status: 1 if any failed."""
    if world_size() > 1:
        raise UserError(f"--sanity runs on one device, but {world_size()} processes were started; start one")
    start = time.monotonic()
    check_prior_file(options, None)
    options, config = deepspeed_config(options, training_values.get("deepspeed"), None)
    stage = config["zero_optimization"]["stage"]
    check_precision(training_values, config, options.tp)
    check_four_bit(options, stage)
    bf16_gradients = bool(accumulate_in_fp32(training_values, config))
    device = torch.device("cuda" if uses_gpu() else "cpu")
    say(hardware(device))
    tokenizer, data = load_data(options)
    dtype = torch.bfloat16 if training_values.get("bf16") else torch.float32
    seed = training_values.get("seed", 42)
    base = load_model(options, tokenizer, dtype, seed)
    prior = smoothing_prior(options, data, tokenizer, base)
    settings = loss_settings(options, None if prior is None else prior.to(device))
    section = config.get("tensor_parallel", {})
    split = plan_split(base) if options.tp > 1 and not has_own_split(section) else None
    if split is not None:
        check_dropout(base, split, options.tp)
    split_over_ranks = [check_model_split(base, options, section, settings)] if options.tp > 1 else []
    model = with_adapter(base, options, seed).to(device)
    rows = data.train.select(range(min(len(data.train), MOST_ROWS, micro_batch(training_values))))
    padded = PadToLongest(tokenizer.pad_token_id)(list(rows))
    batch = {name: value.to(device) for name, value in padded.items() if isinstance(value, Tensor)}
    head_input = capture_head_input(model, batch, **settings)
    checks = [
        check_mask(batch),
        check_formulations(head_input),
        *check_heads(head_input),
        *check_installed(model, batch, options, settings),
        check_split(head_input, max(2, options.tp)),
        *split_over_ranks,
        *([check_packed_rows(model, tokenizer, data.train[0]["input_ids"], device)] if options.packing else []),
        check_overfit(model, batch, options, settings),
        *memory_rows(model, split, options, training_values, stage, bf16_gradients),
        Check("time", f"{time.monotonic() - start:.0f} s"),
    ]
    show(checks)
    return int(any(check.passed is False for check in checks))


def micro_batch(training_values: dict) -> int:
    return training_values.get("per_device_train_batch_size", SftTrainingArguments.per_device_train_batch_size)


def hardware(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{name}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"deepspeed {deepspeed.__version__}, transformers {transformers.__version__}"
    )


def memory_rows(
    model, split: Split | None, options: SftOptions, training_values: dict, stage: int, bf16_gradients: bool
) -> list[Check]:
    """The estimate for the full run, for one and for eight data-parallel ranks; without a `split` all is split."""
    whole = held_whole(model, split) if split is not None else []
    low_precision = bool(training_values.get("bf16") or training_values.get("fp16"))
    # of a model in 4 bits as many values as take the same memory
    sizes = {
        id(p): p.numel() if p.is_floating_point() else p.nbytes // (2 if low_precision else 4)
        for p in model.parameters()
    }
    config = model.config.get_text_config()
    rows = micro_batch(training_values)
    checks = []
    for data_parallel in (1, 8):
        setup = Setup(
            parameters=sum(sizes.values()),
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            whole=sum(p.numel() for p in whole),
            whole_trained=sum(p.numel() for p in whole if p.requires_grad),
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            vocab=config.vocab_size,
            tokens=rows * options.max_length,
            tensor_parallel=options.tp,
            data_parallel=data_parallel,
            zero=stage,
            offload=options.offload,
            low_precision=low_precision,
            fp32_gradients=bool(training_values.get("bf16")) and not bf16_gradients,
            checkpointing=bool(training_values.get("gradient_checkpointing")),
            head=options.head,
            chunk_bytes=options.chunk_bytes,
            device=uses_gpu(),
        )
        parts = estimate(setup)
        figure = ", ".join(f"{name} {size:.2f}" for name, size in parts.items())
        checks.append(Check(f"memory a rank (estimate), GiB, tp {options.tp} x dp {data_parallel}", figure))
    return checks
