"""TRL's `SFTTrainer`. Of several processes: torchrun --nproc_per_node 2 docs/examples/trl_sft.py"""

from datasets import Dataset
from small import RATE, ROWS, SMOOTHING, STEPS, small_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from smoothing.trl import SmoothedSFTTrainer

WORDS = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz=+"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def dataset() -> Dataset:
    """Rows whose completions have unlike numbers of labels; the loss is of these alone."""
    letters = [" ".join(WORDS[3 + i : 7 + 2 * i % 5 + i]) for i in range(STEPS * ROWS)]
    return Dataset.from_list([{"prompt": f"{text} =", "completion": f" {text[::-1]}"} for text in letters])


def train(folder: str = "runs/example", **more) -> SmoothedSFTTrainer:
    model = small_model()
    args = SFTConfig(
        folder,
        max_steps=STEPS,
        learning_rate=RATE,
        optim="sgd",
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        bf16=False,  # TRL's default, which needs a GPU
        save_strategy="no",
        report_to="none",
        **{"per_device_train_batch_size": ROWS, "max_grad_norm": 0.0} | more,
    )
    trainer = SmoothedSFTTrainer(
        model, args, train_dataset=dataset(), processing_class=tokenizer(), label_smoothing=SMOOTHING
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    for log in train().state.log_history:
        print({name: log[name] for name in ("loss", "mean_token_accuracy", "entropy") if name in log})
