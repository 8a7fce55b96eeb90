"""What a training step asks of torch outside the loss: operations, copies, collectives, values that the host reads.

    python benchmarks/step_operations.py                  the embedded default model, in bf16, under ZeRO 1
    python benchmarks/step_operations.py --before         the same with DeepSpeed's search for infinities in gradients
    python benchmarks/step_operations.py --model ... --data ...

Counts what is dispatched from the beginning of a step to its end, on a CPU; other flags are those of `launch/sft.py`.
The loss is left out, since on a device it does other operations: `tests/smoothing/test_gpu_path.py` counts those.
"""

import argparse
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from traceback import extract_stack

sys.path[0] = str(Path(__file__).resolve().parents[1])

from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from launch import sft
from launch.process.exit import run_to_its_end
from launch.training import engine

STEPS = 4
SHOWN = 12
VIEWS = (
    "view _unsafe_view detach slice t transpose select expand unsqueeze squeeze alias as_strided split permute narrow"
)
LOSS = str(Path(__file__).resolve().parents[1] / "smoothing")
READS = ("_local_scalar_dense", "item", "is_nonzero")
KINDS = {
    "views, which launch nothing": VIEWS.split(),
    "copies": ("copy_", "_to_copy", "clone", "_foreach_copy_"),
    "values that the host reads": READS,
    "collectives": ("allreduce_", "_allgather_base_", "allgather_", "broadcast_", "_reduce_scatter_base_"),
}


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()
        self.readers: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        caller = next(frame for frame in reversed(extract_stack()[:-1]) if "/torch/" not in frame.filename)
        if not caller.filename.startswith(LOSS):  # which is also around the model's forward pass
            self.names[name] += 1
            if name in READS:
                self.readers[f"{'/'.join(Path(caller.filename).parts[-2:])}, {caller.name}"] += 1
        return operation(*args, **(kwargs or {}))


class LastStep(TrainerCallback):
    """Counts the last step: those before it have set everything up."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == STEPS - 1:
            self.counted = Counted()
            self.counted.__enter__()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == STEPS:
            self.counted.__exit__(None, None, None)
            self.weights = sum(weight.requires_grad for weight in model.parameters())


def main(argv: list[str]) -> None:
    folder, last = tempfile.mkdtemp(prefix="step-operations-"), LastStep()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--before", action="store_true")
    own, argv = parser.parse_known_args(argv)
    if own.before:
        engine.find_infinities_by_norm = lambda _: None
    flags = ["--bf16", "true", "--zero", "1", *argv, "--max_steps", str(STEPS), "--output_dir", f"{folder}/run"]
    flags += ["--eval_strategy", "no", "--save_strategy", "no", "--samples", "0", "--no_report"]
    try:
        sft.main(flags, callbacks=[last])
    finally:
        shutil.rmtree(folder)
    names = last.counted.names
    print(f"{names.total():,} operations a step, {last.weights} weights trained")
    for kind, operations in KINDS.items():
        print(f"  {sum(names[name] for name in operations):6,} {kind}")
    print("which the host reads in:")
    for reader, count in last.counted.readers.most_common():
        print(f"  {count:6,} {reader}")
    print("the most frequent:")
    for name, count in names.most_common(SHOWN):
        print(f"  {count:6,} {name}")


if __name__ == "__main__":
    run_to_its_end(main, sys.argv[1:])
