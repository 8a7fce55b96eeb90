"""Held-out prompts, completed by the model as it stands: what a person would rather read than a loss."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from launch.data.examples.rows import IGNORED

MAX_NEW_TOKENS = 48


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows, device, before_each: Callable[[], None]
) -> list[dict[str, str]]:
    """Greedy completions of the rows' prompts, with the completion that was wanted. All ranks must call it."""
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
                eos_token_id=tokenizer.eos_token_id,
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
    """A sample for the log."""
    return (
        f"{sample['where']}\n  prompt     | {sample['prompt'][-200:]!r}\n"
        f"  completion | {sample['completion']!r}\n  wanted     | {sample['wanted'][:200]!r}"
    )
