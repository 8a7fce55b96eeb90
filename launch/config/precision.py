"""Which precision a run can have, and in which one its gradients are accumulated."""

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime.config import DtypeEnum

from launch.common.errors import UserError

GRADIENTS = "grad_accum_dtype"  # in the section "data_types" of a DeepSpeed file
FP32_STAGES = (2, 3)  # where a rank has its own part of the gradients alone, so that fp32 takes little


def check_precision(values: Mapping[str, Any], config: Mapping[str, Any], tp: int) -> None:
    """Raise `UserError` for a precision with which DeepSpeed fails, or trains otherwise than one process.

    Args:
        values: The given training arguments.
        config: The DeepSpeed configuration.
        tp: The tensor-parallel size.
    """
    stage, gradients = config["zero_optimization"]["stage"], _gradients(config)
    if stage:
        return
    if values.get("fp16"):
        raise UserError(
            "--fp16 needs --zero 1 or more: without ZeRO DeepSpeed divides gradients by a loss scale that it never "
            "multiplied the loss with"
        )
    if values.get("bf16") and tp > 1:
        raise UserError(
            f"--bf16 with --tp {tp} needs --zero 1 or more: without ZeRO DeepSpeed clips by the gradient norm of one "
            "tensor-parallel rank"
        )
    if values.get("bf16") and gradients is torch.float32:
        raise UserError(f"{GRADIENTS} fp32 needs --zero 1 or more with --bf16: DeepSpeed has it only with ZeRO")


def accumulate_in_fp32(values: Mapping[str, Any], config: dict[str, Any]) -> str | None:
    """Have bf16 gradients accumulated in fp32 where that takes little memory; what a user's file says stays.

    Args:
        values: The given training arguments.
        config: The DeepSpeed configuration, which is changed.

    Returns:
        What to say of gradients that are accumulated in bf16, or None.
    """
    if not values.get("bf16"):
        return None
    gradients = _gradients(config)
    if gradients is None and config["zero_optimization"]["stage"] in FP32_STAGES:
        config["data_types"] = {**config.get("data_types", {}), GRADIENTS: "fp32"}
        return None
    if gradients is torch.float32:
        return None
    return (
        "gradients are accumulated in bf16, which rounds off much of what the head computes in fp32; --zero 2 and 3 "
        "accumulate in fp32"
    )


def _gradients(config: Mapping[str, Any]) -> torch.dtype | None:
    """Return the dtype that a DeepSpeed file names for gradients, None if it names none."""
    name = config.get("data_types", {}).get(GRADIENTS)
    if name is None:
        return None
    try:
        return DtypeEnum(name).value
    except ValueError:
        raise UserError(f"data_types.{GRADIENTS} must be fp32 or bf16, got {name!r}") from None
