"""What a run with adapters was trained beside: a digest of the files of its base model, which no checkpoint holds."""

import hashlib
import json
from pathlib import Path

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

NOT_OF_THE_MODEL = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")  # of config.json
SAMPLE = 4096  # bytes at a time: of each weight its beginning, middle and end are read


def base_digest(model: str) -> str:
    """Return the SHA-256 of a model's configuration and weights, whichever files the weights are in.

    Of each weight name, type, shape and three samples count, so that the largest model is read in a moment. Call it
    once the model is loaded: of a hub name the files are then in the cache.
    """
    digest = hashlib.sha256()
    config = json.loads(Path(_file(model, CONFIG_NAME)).read_text(encoding="utf-8"))
    digest.update(json.dumps({k: v for k, v in config.items() if k not in NOT_OF_THE_MODEL}, sort_keys=True).encode())
    samples = {name: sample for file in _weight_files(model) for name, sample in _samples(file).items()}
    for name in sorted(samples):
        digest.update(f"\n{name} {samples[name]}".encode())
    return digest.hexdigest()


def _weight_files(model: str) -> list[Path]:
    """Return the files that transformers loads: one, or those that an index names."""
    if (single := _file(model, SAFE_WEIGHTS_NAME)) is not None:
        return [Path(single)]
    index = json.loads(Path(_file(model, SAFE_WEIGHTS_INDEX_NAME)).read_text(encoding="utf-8"))
    return [Path(_file(model, name)) for name in sorted(set(index["weight_map"].values()))]


def _samples(file: Path) -> dict[str, str]:
    """Map the weights in a safetensors file to their type, shape and a digest of their samples."""
    found = {}
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        header = json.loads(data.read(length))
        for name, about in header.items():
            if name == "__metadata__":
                continue
            start, end = about["data_offsets"]
            digest = hashlib.sha256()
            for place in (start, (start + end - SAMPLE) // 2, end - SAMPLE):
                data.seek(8 + length + max(start, place))
                digest.update(data.read(min(SAMPLE, end - start)))
            found[name] = f"{about['dtype']} {about['shape']} {digest.hexdigest()}"
    return found


def _file(model: str, name: str):
    return cached_file(model, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)
