"""Names of the distributions that smoothing may give its mass to, and what they cannot be used with."""

from pathlib import Path

UNIFORM, UNIGRAM = "uniform", "unigram"
SUFFIXES = (".npy", ".safetensors")


def prior_name_problem(prior: str, smoothing: float, head: str, streaming: bool) -> str | None:
    """Return why a run of these flags cannot have `--smoothing_prior`, or None."""
    if prior == UNIFORM:
        return None
    flag = f"--smoothing_prior {prior}"
    if prior != UNIGRAM and Path(prior).suffix not in SUFFIXES:
        return f"--smoothing_prior must be {UNIFORM}, {UNIGRAM}, or a file of {' or '.join(SUFFIXES)}, got {prior!r}"
    if smoothing == 0:
        return f"{flag} says where the mass of --smoothing goes, which is 0; give it, or leave out the prior"
    if head == "dense":
        return f"{flag} cannot be used with --head dense, which is F.cross_entropy; use --head fused or sharded"
    if prior == UNIGRAM and streaming:
        return (
            f"{flag} is counted over all labels before training, which --streaming does not read; count them "
            "yourself, and give a file"
        )
    return None
