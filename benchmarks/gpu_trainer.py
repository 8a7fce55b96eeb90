"""Training by `transformers.Trainer` alone, with Liger's kernels where they are installed: what `gpu_training.py` is
compared with. Prints one JSON object.

    python benchmarks/gpu_trainer.py '{"model_type": "llama", ...}' --rows 96 --steps 24

Rows are random tokens, about as long as those that `gpu_training.py` makes up, two in five of them labels: what they
say has no influence on the time.
"""

import argparse
import importlib.util
import json
import random
import tempfile
import time

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

LENGTHS = (140, 260)  # of rows, in tokens, alike in all of this range
LEARNED = 2 / 5
IGNORED = -100


class Rows(torch.utils.data.Dataset):
    """Random rows, the same for the same number."""

    def __init__(self, count: int, vocab: int):
        draw = random.Random(0)
        self.lengths = [draw.randint(*LENGTHS) for _ in range(count)]
        self.vocab = vocab

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(self.vocab, (self.lengths[index],), generator=generator)
        labels = ids.clone()
        labels[: round((1 - LEARNED) * len(ids))] = IGNORED
        return {"input_ids": ids, "labels": labels}


def padded(rows: list[dict]) -> dict:
    """A batch, padded to its longest row."""
    parts = {"input_ids": 0, "labels": IGNORED}
    batch = {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in parts.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    return batch | {"attention_mask": (torch.arange(batch["labels"].shape[1]) < lengths[:, None]).long()}


class StepTimes(TrainerCallback):
    """When each step ended, once its device is done."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="its configuration, as JSON")
    parser.add_argument("--rows", type=int, required=True, help="to a step")
    parser.add_argument("--steps", type=int, required=True)
    args = parser.parse_args()
    values = json.loads(args.model)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    liger = importlib.util.find_spec("liger_kernel") is not None and torch.cuda.is_available()
    rows, times = Rows(args.rows * args.steps, config.vocab_size), StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            per_device_train_batch_size=args.rows,
            max_steps=args.steps,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            optim="adamw_torch_fused",
            use_liger_kernel=liger,
            report_to=[],
            save_strategy="no",
            logging_steps=args.steps,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        Trainer(model, options, train_dataset=rows, data_collator=padded, callbacks=[times]).train()
    first = max(1, args.steps // 3)  # in which kernels are compiled and memory is found
    read = sum(rows.lengths) / len(rows) * args.rows * (args.steps - first)
    seconds = times.ends[-1] - times.ends[first - 1]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    result = {"tokens": read / seconds, "label_tokens": LEARNED * read / seconds, "peak_gib": peak / 2**30}
    print(json.dumps({"liger": liger, **result}))


if __name__ == "__main__":
    main()
