"""Whether Triton interprets its kernels on the CPU instead of compiling them."""

import os


def interpreted() -> bool:
    """Return whether `TRITON_INTERPRET=1` is set; Triton reads it when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
