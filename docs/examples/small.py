"""What the examples train: a small Llama, and batches whose rows have unlike numbers of labels."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, ROWS, LENGTH, STEPS, RATE, SMOOTHING = 101, 4, 12, 4, 0.3, 0.1


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def rows(step: int) -> list[dict[str, torch.Tensor]]:
    """The global batch of a step: row i has a prompt of 1 + 2i tokens, which have no label."""
    generator = torch.Generator().manual_seed(step)
    ids_RL = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=generator)
    labels_RL = ids_RL.clone()
    for row in range(ROWS):
        labels_RL[row, : 1 + 2 * row] = -100
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        for ids, labels in zip(ids_RL, labels_RL, strict=True)
    ]


def batch(step: int, rank: int = 0, ranks: int = 1) -> dict[str, torch.Tensor]:
    """What one of `ranks` data-parallel ranks gets of a step's rows."""
    own = rows(step)[rank::ranks]
    return {name: torch.stack([row[name] for row in own]) for name in own[0]}
