"""A base model whose linear layers are kept in 4 bits, by bitsandbytes, while adapters are trained beside it."""

from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig

from launch.common.errors import UserError
from launch.config.options import SftOptions


def check_four_bit(options: SftOptions, stage: int) -> None:
    """Raise `UserError` if `--load_in_4bit` is given and cannot be used here, before data and model are loaded."""
    if not options.load_in_4bit:
        return
    if options.tp > 1:
        raise UserError(f"--load_in_4bit cannot be used with --tp {options.tp}: packed weights are not split")
    if stage == 3:
        raise UserError("--load_in_4bit cannot be used with --zero 3: packed weights are not divided; use --zero 2")
    if find_spec("bitsandbytes") is None:
        raise UserError("--load_in_4bit needs bitsandbytes, which is not installed: pip install bitsandbytes")


def quantization(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return QLoRA's: normal floats of 4 bits, whose scales are quantised too, multiplied in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
