"""Which DeepSpeed configuration a run uses: a file of `ds_configs/`, or the user's own."""

import json
from pathlib import Path

from launch.errors import UserError
from launch.options import SftOptions

DS_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"
DEFAULT_STAGE = 1


def deepspeed_config(options: SftOptions, path: str | None, world_size: int | None) -> dict:
    """The configuration, with `tensor_parallel.autotp_size` filled in, and `options.tp` set to what it says.

    Batch sizes, learning rate and precision stay `"auto"`: they are the recipe's. Raises `UserError` for a file
    that cannot be read, contradicts `--tp` or `--zero`, or asks for more tensor-parallel ranks than there are
    (`world_size`; None where the run is only looked at).
    """
    config = _read(path, options) if path else _built_in(options)
    for key in ("tensor_parallel", "zero_optimization"):
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f"--deepspeed {path}: {key} must be an object, got {config[key]!r}")
    tensor_parallel = config.get("tensor_parallel", {})
    size = tensor_parallel.get("autotp_size", 1)
    if size != "auto" and (not isinstance(size, int) or isinstance(size, bool)):
        raise UserError(f'--deepspeed {path}: autotp_size must be an integer or "auto", got {size!r}')
    if size == "auto":
        size = tensor_parallel["autotp_size"] = options.tp
    if size > 1 and options.tp not in (1, size):
        raise UserError(f"{path} says autotp_size {size} and --tp says {options.tp}; keep one of them")
    if options.tp > 1 and size <= 1:
        raise UserError(
            f"--tp {options.tp} needs tensor_parallel.autotp_size in {path}; set it to {options.tp} there"
        )
    options.tp = max(1, size)
    if options.tp == 1:
        config.pop("tensor_parallel", None)
    if world_size is not None and world_size % options.tp:
        raise UserError(
            f"tensor parallelism {options.tp} does not divide the {world_size} process(es) of this run; start "
            f"{options.tp} or a multiple of it (deepspeed --num_gpus {options.tp} launch/sft.py ...)"
        )
    config.setdefault("zero_optimization", {}).setdefault("stage", 0)
    if options.tp > 1 or config["zero_optimization"]["stage"] == 3:
        # without it Trainer.save_model writes no weights at all
        config["zero_optimization"]["gather_16bit_weights_on_model_save"] = True
    return config


def _built_in(options: SftOptions) -> dict:
    stage = DEFAULT_STAGE if options.zero is None else options.zero
    name = f"zero{stage}{'_offload' if options.offload else ''}{'_tp' if options.tp > 1 else ''}.json"
    return json.loads((DS_CONFIGS / name).read_text())


def _read(path: str, options: SftOptions) -> dict:
    if options.zero is not None or options.offload:
        raise UserError(f"--deepspeed {path} already says the ZeRO stage; leave out --zero and --offload")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as fault:
        raise UserError(f"--deepspeed {path} is not a readable JSON file: {fault}") from None
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed {path}: expected a JSON object, got {type(config).__name__}")
    return config
