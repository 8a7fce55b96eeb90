"""A user's own DeepSpeed file, checked before anything is built from it: its keys, and the values of each."""

import copy
import functools
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.monitor.config import DeepSpeedMonitorConfig
from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError, HybridEngineConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from launch.common.errors import UserError
from launch.common.messages import error_line
from launch.config.deepspeed_sections import (
    AUTO,
    check_model,
    check_optimizer,
    check_scheduler,
    check_section,
    check_type,
    unknown_key,
)

BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
MODELS = {
    "zero_optimization": DeepSpeedZeroConfig,
    "tensor_parallel": TPTrainingConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "compile": CompileConfig,
    "hybrid_engine": HybridEngineConfig,
    "comms_logger": CommsLoggerConfig,
    **{name: field.annotation for name, field in DeepSpeedMonitorConfig.model_fields.items()},
}
PLAIN = {"activation_checkpointing": ACT_CHKPT_DEFAULT, "aio": AIO_DEFAULT_DICT}
UNSUPPORTED = {
    "pipeline": "pipeline parallelism is not supported here; leave it out",
    "sequence_parallel_size": "sequence parallelism is not supported here; leave it out",
    "bfloat16": "transformers, which fills in the precision, knows this section as bf16; rename it",
}
SENDS = {"wandb": "wandb", "comet": "comet_ml"}  # sections of trackers on a server: --report_to's name
SECTION: dict[str, Any] = {}  # the default of a key that DeepSpeed reads only if it is present


def check_file(config: dict, source: str) -> None:
    """Raise `UserError` for a key that DeepSpeed does not know, or a value that it would fail on or misread."""
    for name, reason in UNSUPPORTED.items():
        if name in config:
            raise UserError(f"{source}: {name}: {reason}")
    known = _known()
    for name in config:
        if name not in known:
            raise unknown_key(source, name, known.keys() - UNSUPPORTED.keys())
    for name, tracker in SENDS.items():
        if isinstance(section := config.get(name), dict) and section.get("enabled"):
            raise UserError(f"{source}: {name}: leave it out, and give --report_to {tracker} on the command line")
    removed = _refusal({name: {} for name in config})
    if isinstance(removed, DeepSpeedConfigError):  # the names of features that DeepSpeed has removed, with the reason
        raise UserError(f"{source}: {error_line(removed)}")
    for name, value in config.items():
        _check_value(name, value, known[name], config, f"{source}: {name}")
    refusal = _refusal(config)
    if refusal is not None:
        raise UserError(f"{source}: DeepSpeed refuses it: {error_line(refusal)}")


def _check_value(name: str, value: Any, default: Any, config: dict, source: str) -> None:
    if name in MODELS:
        check_model(MODELS[name], value, source)
    elif name in PLAIN:
        check_section(value, PLAIN[name], source)
    elif name == "optimizer":
        check_optimizer(value, offloads_optimizer(config), source)
    elif name == "scheduler":
        check_scheduler(value, source)
    elif name in BATCH:
        if value != AUTO and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f'{source} must be "auto" or an integer of at least 1, got {value!r}')
    elif name != "gradient_clipping" or value != AUTO:  # an "auto" in it, or in BATCH, is filled in from the recipe
        check_type(value, default, source)


def offloads_optimizer(config: dict) -> bool:
    """Return whether a configuration keeps the optimizer off the device."""
    zero = config.get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, dict) else None
    return isinstance(offload, dict) and offload.get("device") in ("cpu", "nvme")


class _RecordingDict(dict):
    """Records the keys that DeepSpeed looks up: DeepSpeed publishes no list of them."""

    def __init__(self, values: dict):
        super().__init__(values)
        self.names: dict[str, Any] = {}  # with the default of each, if DeepSpeed gives one

    def get(self, name, default=None):
        if self.names.get(name, SECTION) is SECTION or default is not None:
            self.names[name] = default
        return super().get(name, default)

    def __contains__(self, name):
        self.names.setdefault(name, SECTION)
        return super().__contains__(name)

    def keys(self):
        return self  # for `name in config.keys()`


@functools.cache
def _known() -> dict[str, Any]:
    """The outermost keys that DeepSpeed reads, with its defaults."""
    recorded = _RecordingDict({"train_micro_batch_size_per_gpu": 1})
    DeepSpeedConfig(recorded)
    # two defaults that do not show the type: None for "never", False instead of an object
    return recorded.names | {"steps_per_print": 10, "datastates_ckpt": None}


def _refusal(config: dict) -> Exception | None:
    """Return what DeepSpeed raises for `config` without its batch sizes, which it would divide by ranks."""
    try:
        copied = copy.deepcopy(config)  # as transformers copies it, and fails on what is nested too deeply
        given = {name: value for name, value in copied.items() if name not in BATCH}
        DeepSpeedConfig(given | {"train_micro_batch_size_per_gpu": 1})
    except Exception as error:
        return error
    return None
