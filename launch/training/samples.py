"""Held-out prompts completed by the trained model, for people to read."""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from launch.common.atomic_files import write_whole
from launch.common.paths import SAMPLES
from launch.data.examples.rows import IGNORED
from launch.data.preview.decoded import decoded
from launch.data.preview.pieces import pieces_of
from launch.data.preview.shown import tokens_of
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
) -> list[dict[str, Any]]:
    """Return greedy completions of the rows' prompts beside the expected ones. All ranks must call this.

    `tokens` has the completion in pieces, each with the probability that the model gave it.
    """
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
                output_logits=True,
                return_dict_in_generate=True,
            )
        ids = output.sequences[0, prompt.shape[1] :]
        completions.append(
            {
                "where": row["where"],
                "prompt": tokenizer.decode(prompt[0], skip_special_tokens=True),
                "completion": tokenizer.decode(ids, skip_special_tokens=True),
                "wanted": tokenizer.decode(row["input_ids"][start:], skip_special_tokens=True),
                "tokens": with_confidence(prompt[0, -1:].tolist(), ids.tolist(), output.logits, tokenizer),
            }
        )
    return completions


def with_confidence(before: list[int], ids: list[int], logits: Sequence[torch.Tensor], tokenizer) -> list:
    """Return `[text, probability]` of each piece of a completion: of a token, or of a few that share a character.

    Args:
        before: What comes before the completion.
        ids: Its tokens.
        logits: Of each token, `[1, V]`.
        tokenizer: Decodes them.
    """
    nll = [
        F.cross_entropy(z.float(), torch.tensor([token], device=z.device)).item()
        for z, token in zip(logits, ids, strict=True)
    ]
    text, spans = decoded([*before, *ids], tokenizer)
    tokens = tokens_of([*before, *ids], tokenizer)
    pieces = pieces_of(tokens[len(before) :], ids, text, spans[len(before) :])
    at = iter(nll)
    found = []
    for piece in pieces:
        if piece.tokens:
            sure = math.exp(-sum(next(at) for _ in piece.tokens))
            found.append([piece.text or piece.tokens[0].name, round(sure, 4)])
    return found


def shown(sample: dict[str, Any]) -> str:
    """Format a sample for the log."""
    return (
        f"{sample['where']}\n  prompt     | {sample['prompt'][-200:]!r}\n"
        f"  completion | {sample['completion']!r}\n  wanted     | {sample['wanted'][:200]!r}"
    )
