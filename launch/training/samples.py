"""Held-out prompts completed by the trained model, for people to read."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from launch.common.atomic_files import write_whole
from launch.common.paths import SAMPLES
from launch.data.examples.rows import IGNORED
from launch.process.ranks import is_main, say
from launch.training.trainer import SftTrainer

MAX_NEW_TOKENS = 48


def write_samples(trainer: SftTrainer, tokenizer, heldout, count: int) -> None:
    """Complete the first `count` held-out prompts, print them and write them to `samples.jsonl`.

    All ranks must call this.
    """
    rows = heldout.select(range(min(count, len(heldout))))
    beat = partial(trainer.watchdog.beat, "completing samples")
    samples = complete(trainer.model, tokenizer, rows, trainer.args.device, before_each=beat)
    if is_main():
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        write_whole(Path(trainer.args.output_dir) / SAMPLES, lines)
    for sample in samples:
        say(shown(sample))


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows, device, before_each: Callable[[], None]
) -> list[dict[str, str]]:
    """Return greedy completions of the rows' prompts beside the expected ones. All ranks must call this."""
    model.eval()
    completions = []
    for row in rows:
        before_each()
        start = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
        prompt = torch.tensor([row["input_ids"][: max(start, 1)]], device=device)
        with torch.no_grad():
            output = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=model.generation_config.eos_token_id,
            )
        completions.append(
            {
                "where": row["where"],
                "prompt": tokenizer.decode(prompt[0], skip_special_tokens=True),
                "completion": tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True),
                "wanted": tokenizer.decode(row["input_ids"][start:], skip_special_tokens=True),
            }
        )
    return completions


def shown(sample: dict[str, str]) -> str:
    """Format a sample for the log."""
    return (
        f"{sample['where']}\n  prompt     | {sample['prompt'][-200:]!r}\n"
        f"  completion | {sample['completion']!r}\n  wanted     | {sample['wanted'][:200]!r}"
    )
