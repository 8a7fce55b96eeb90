"""What can be done with a run that has ended: shown after its model, as commands."""

import json
import shlex
from pathlib import Path

from launch.common.paths import SMOOTHING_PRIOR
from launch.run.checkpoints import checkpoints

TRY_IT = (
    "from transformers import pipeline; "
    'print(pipeline("text-generation", {model})("YOUR PROMPT", max_new_tokens=60)[0]["generated_text"])'
)
MERGE_IT = (
    "from peft import AutoPeftModelForCausalLM; from transformers import AutoTokenizer, GenerationConfig; "
    "model = AutoPeftModelForCausalLM.from_pretrained({model}).merge_and_unload(); "
    "model.generation_config = GenerationConfig.from_pretrained({model}); "
    "model.config.label_smoothing = model.generation_config.label_smoothing; {prior}"
    "model.save_pretrained({merged}); AutoTokenizer.from_pretrained({model}).save_pretrained({merged}){copied}"
)


def next_steps(run: Path, model: Path, steps: int, adapter: bool = False, four_bit: bool = False) -> str:
    """Return commands that try the model of this run, evaluate it on other rows or merge it, and train it further.

    A run without a checkpoint (--save_strategy no) is trained further from its model, with a new optimizer; its
    adapter can only be tried. That of a base in 4 bits (`four_bit`) is merged by peft into the base as it was.
    """
    code = TRY_IT.format(model=json.dumps(str(model)))
    further = f"--resume_from_checkpoint {shlex.quote(str(run))} --max_steps {2 * steps}"
    kept = bool(checkpoints(run))
    if not kept:
        further = f"--model {shlex.quote(str(model))} (no checkpoint was kept, so the optimizer starts anew)"
    evaluate = [f"  evaluate it:    python launch/evaluate.py --model {shlex.quote(str(model))} --data ROWS.jsonl"]
    merge = [
        f"  merge it:       mv {shlex.quote(str(model))} {shlex.quote(f'{model}-adapter')}; this command with",
        f"                  --output_dir {shlex.quote(str(run))} --merge_adapter true",
    ]
    if four_bit:
        merge = [f"  merge it:       python -c {shlex.quote(_merge_by_peft(run, model))}"]
    return "\n".join(
        [
            "next:",
            f"  try it:         python -c {shlex.quote(code)}",
            *(evaluate if not adapter else merge if kept or four_bit else []),
            *([f"  train further:  this command with {further}"] if kept or not adapter else []),
        ]
    )


def _merge_by_peft(run: Path, model: Path) -> str:
    """Return a program that merges an adapter, and leaves to the whole model what tells its smoothing."""
    merged, prior, copied = json.dumps(f"{model}-merged"), "", ""
    if (run / SMOOTHING_PRIOR).exists():
        prior = f"model.config.smoothing_prior = {json.dumps(SMOOTHING_PRIOR)}; "
        copied = f"; from shutil import copy; copy({json.dumps(str(run / SMOOTHING_PRIOR))}, {merged})"
    return MERGE_IT.format(model=json.dumps(str(model)), merged=merged, prior=prior, copied=copied)
