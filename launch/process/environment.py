"""What has to be said to torch and the libraries above it before they are imported."""

import logging
import os
import sys
import warnings


def share_cores() -> None:
    """Threads that wait give up their core. Spinning, the default, costs a run on shared cores most of its speed.

    Measured on two cores with two other busy processes: a training step of the default model takes 8.3 s spinning,
    2.0 s waiting.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def skip_shared_memory_op() -> None:
    """Do without the C++ op that DeepSpeed builds at its first start on a CPU, for all-reduces of inference alone.

    Building it takes a compiler and minutes, and a start that is interrupted meanwhile leaves a lock behind on which
    every later one waits without end. Which of its ops could be built is not asked for at all: finding out starts
    compilers, and warns of a toolkit that nothing here needs.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def load_weights_only() -> None:
    """Nothing that `torch.load` reads may run code: checkpoints of a directory that a user was merely pointed at.

    DeepSpeed asks for full pickles; torch lets the environment overrule it. What its checkpoints hold beside tensors
    is named here.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])
    # by its value; some Pythons (3.11.2, which is Debian 12's) write a call of getattr, which would not be read
    ZeroStageEnum.__reduce_ex__ = lambda member, protocol: (type(member), (member.value,))


def keep_quiet() -> None:
    """Errors and this project's own words only; no progress bars into a file."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else pages of C++ frames once another rank is gone
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of every accumulation, which DeepSpeed does
    # said by torch about DeepSpeed's calls, and by accelerate about the threads that ensure_environment sets
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
