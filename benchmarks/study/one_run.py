"""One run of the study in a process of its own: `launch/sft.py`, measured on held-out rows after some epochs.

    python -m benchmarks.study.one_run HELD_OUT FOLDER EPOCH[,EPOCH...] [flags of launch/sft.py]

Writes FOLDER/epoch-N.npz; epoch 0 is before the first step.
"""

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file
from transformers import TrainerCallback

from benchmarks.study.measured import Measured, measure
from launch import sft
from launch.common.paths import MODEL, SMOOTHING_PRIOR
from launch.config.command_line import parse_options
from launch.process.exit import run_to_its_end


class HeldOut(TrainerCallback):
    """Measures the model on rows that it is not trained on, after each of these epochs."""

    def __init__(self, rows: str, folder: Path, epochs: list[int], options):
        self.rows, self.folder, self.epochs, self.options = rows, folder, epochs, options

    def on_train_begin(self, args, state, control, **kwargs):
        self.measure(0, Path(args.output_dir), **kwargs)

    def on_epoch_end(self, args, state, control, **kwargs):
        self.measure(round(state.epoch), Path(args.output_dir), **kwargs)

    def measure(self, epoch: int, run: Path, model=None, processing_class=None, **kwargs) -> None:
        if epoch in self.epochs:
            kept = run / SMOOTHING_PRIOR
            prior = load_file(kept)["smoothing_prior"] if kept.exists() else None
            measured = measure(model, processing_class, self.rows, self.options, prior)
            measured.write(self.folder / Measured.file(epoch))


def main(argv: list[str]) -> None:
    held_out, folder, epochs, *flags = argv
    callback = HeldOut(held_out, Path(folder), [int(epoch) for epoch in epochs.split(",")], parse_options(flags)[0])
    run = Path(folder) / "run"
    sft.main([*flags, "--output_dir", str(run)], callbacks=[callback])
    shutil.rmtree(run / MODEL)  # half a gigabyte each; what was measured is kept


if __name__ == "__main__":
    run_to_its_end(main, sys.argv[1:])
