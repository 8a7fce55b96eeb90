"""Selection of a run's DeepSpeed configuration: a file of `ds_configs/`, or the user's own."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.common.errors import UserError
from launch.common.messages import counted
from launch.config.deepspeed_read import read_file
from launch.config.options import SftOptions

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
DEFAULT_STAGE = 1
GATHER = "gather_16bit_weights_on_model_save"
OWN_SPLITS = ("partition_config", "preset_model")  # a user's file may say how to split
OTHER_NAMES = (f"stage3_{GATHER}", "stage3_gather_fp16_weights_on_model_save")  # DeepSpeed takes one of them


def deepspeed_config(
    options: SftOptions, path: str | None, world_size: int | None
) -> tuple[SftOptions, dict[str, Any]]:
    """Return the options with `tp` from the user's file, and the configuration with `tensor_parallel.autotp_size`.

    Batch sizes, learning rate and precision stay `"auto"`: the recipe sets them. Raises `UserError` for a file that
    cannot be read or is invalid (`launch.config.deepspeed_file`), that contradicts `--tp` or `--zero`, or whose
    tensor parallelism does not divide the run's `world_size` (None: not checked).
    """
    config = _built_in(options) if path is None else _read(path, options)
    tensor_parallel = config.get("tensor_parallel", {})
    size = tensor_parallel.get("autotp_size", 1)
    if size == "auto":
        size = tensor_parallel["autotp_size"] = options.tp
    if size < 1:
        raise UserError(f"--deepspeed {path}: tensor_parallel.autotp_size must be at least 1, got {size}")
    if size > 1 and options.tp not in (1, size):
        raise UserError(f"{path} sets autotp_size {size}, but --tp is {options.tp}; keep one of them")
    if options.tp > 1 and size <= 1:
        raise UserError(
            f"--tp {options.tp} needs tensor_parallel.autotp_size in {path}; set it to {options.tp} there"
        )
    options = replace(options, tp=max(1, size))
    if options.tp == 1:
        config.pop("tensor_parallel", None)
    elif options.lora_rank:
        _check_split_adapter(options, tensor_parallel)
    if world_size is not None and world_size % options.tp:
        raise UserError(
            f"tensor parallelism {options.tp} does not divide the {counted(world_size, 'process', 'processes')} of "
            f"this run; start {options.tp} or a multiple of it (deepspeed --num_gpus {options.tp} launch/sft.py ...)"
        )
    zero = config["zero_optimization"]
    zero["stage"] = int(zero.get("stage", 0))
    _check_batch(config, options.tp, path)
    if options.tp > 1 or zero["stage"] == 3:
        # without it Trainer.save_model writes no weights at all
        for name in OTHER_NAMES:
            zero.pop(name, None)
        zero[GATHER] = True
    return options, config


def _check_split_adapter(options: SftOptions, tensor_parallel: dict[str, Any]) -> None:
    """Raise `UserError` for an adapter that tensor-parallel ranks would train otherwise than one process."""
    flag = f"cannot be used with tensor parallelism {options.tp}"
    if own := [name for name in OWN_SPLITS if tensor_parallel.get(name)]:
        raise UserError(
            f"--lora_rank {flag} and {' and '.join(own)} in the DeepSpeed file: adapters are split as the layers are "
            "that they stand beside, by the split that this job makes; leave it out of the file"
        )


def _check_batch(config: dict, tp: int, path: str | None) -> None:
    """Leave the batch size to DeepSpeed; transformers would count tensor-parallel ranks as data-parallel."""
    size = config.get("train_batch_size", "auto")
    if size == "auto":
        config.pop("train_batch_size", None)
    elif tp > 1:
        raise UserError(
            f"--deepspeed {path}: train_batch_size {size} cannot be set under tensor parallelism; "
            "leave it out, it follows from the micro-batch, the accumulation steps and the data-parallel ranks"
        )


def _built_in(options: SftOptions) -> dict:
    stage = DEFAULT_STAGE if options.zero is None else options.zero
    name = f"zero{stage}{'_offload' if options.offload else ''}{'_tp' if options.tp > 1 else ''}.json"
    return json.loads((DS_CONFIGS / name).read_text())


def check_early(options: SftOptions, path: str | None, world_size: int) -> None:
    """Raise the `UserError` of `deepspeed_config` if it can be told before DeepSpeed is imported."""
    if path is None:
        deepspeed_config(options, None, world_size)
    else:
        _read_json(path, options)


def _read_json(path: str, options: SftOptions) -> dict:
    if path and (options.zero is not None or options.offload):
        raise UserError(f"--deepspeed {path} already sets the ZeRO stage; leave out --zero and --offload")
    return read_file(path)


def _read(path: str, options: SftOptions) -> dict:
    """The user's own file, with "auto" for what it leaves to the recipe, as in the built-in files."""
    from launch.config.deepspeed_file import check_file, offloads_optimizer  # imports DeepSpeed

    config = _read_json(path, options)
    check_file(config, f"--deepspeed {path}")
    for key, value in json.loads((DS_CONFIGS / "zero0.json").read_text()).items():
        config.setdefault(key, value)
    for precision in ("bf16", "fp16"):
        config[precision].setdefault("enabled", "auto")
    if offloads_optimizer(config) and "optimizer" not in config:  # torch's own, which need not be compiled
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    return config
