"""What has to be set before torch and the libraries above it are imported."""

import logging
import os
import sys
import warnings


def share_cores() -> None:
    """Make waiting threads give up their core. Spinning, the default, costs a run on shared cores most of its speed.

    Measured on two cores with two other busy processes: a training step of the default model takes 8.3 s spinning,
    2.0 s waiting.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def keep_quiet() -> None:
    """Silence libraries except for errors; no progress bars into a file."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else pages of C++ frames once another rank has exited
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_is_news)  # DeepSpeed sets the level again when it is imported
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of every accumulation, which DeepSpeed does
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it misses a kernel for 4 bits
    # warnings of torch about DeepSpeed's calls, and of accelerate about the threads that ensure_environment sets
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")
    # peft 0.21 asks transformers 5.24 for an attribute that has another name now
    warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing`")
    # to bind a device, as it advises, fails with one rank (DeepSpeed's issue 8248); with several DeepSpeed does
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a line of DeepSpeed's log is shown. A run reports itself that it is on a CPU."""
    return not record.getMessage().startswith("Setting accelerator to CPU")
