"""What a run exports is used as it is: by `pipeline`, which stops where training stopped; and its card."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from tests.support.small_run import flags, launch_many
from tests.support.tokenizers import byte_level

COMMON = {
    "smoothing": 0.1,
    "learning_rate": 0.02,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "weight_decay": 0,
    "per_device_train_batch_size": 8,
    "eval_fraction": 0.1,
    "max_length": 64,
    "samples": 0,
    "save_strategy": "no",
    "no_report": True,
}
ANSWERS = ("yes", "no, no")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A chat that is learned by heart, and rows of tokens that begin with a BOS that the tokenizer does not add."""
    folder = tmp_path_factory.mktemp("export")
    tokenizer = byte_level("<|endoftext|>", bos="<s>")
    tokenizer.pad_token = "<|endoftext|>"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    chats = [
        [{"role": "user", "content": f"say {answer}"}, {"role": "assistant", "content": answer}] for answer in ANSWERS
    ] * 10
    ids = [tokenizer.bos_token_id, *tokenizer("hello").input_ids, tokenizer.eos_token_id]
    rows = {"chat": [{"messages": chat} for chat in chats], "tokens": [{"input_ids": ids, "labels": ids}] * 20}
    todo = []
    for name, data in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
        places = {"model": folder / "base", "data": folder / f"{name}.jsonl", "output_dir": folder / name}
        todo.append(flags(COMMON | places | {"max_steps": 60 if name == "chat" else 2}))
    launch_many(folder, 1, todo)
    return folder


def test_a_pipeline_answers_chats_and_stops(runs):
    """At the mark that ends answers, which is not the tokenizer's EOS."""
    generator = pipeline("text-generation", str(runs / "chat/model"))
    for answer in ANSWERS:
        asked = [{"role": "user", "content": f"say {answer}"}]
        said = generator(asked, max_new_tokens=20, do_sample=False)[0]["generated_text"]
        assert said[-1] == {"role": "assistant", "content": answer}
    tokenizer = AutoTokenizer.from_pretrained(runs / "chat/model")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(runs / "base").chat_template
    stops = AutoModelForCausalLM.from_pretrained(runs / "chat/model").generation_config.eos_token_id
    assert stops == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


def test_a_tokenizer_begins_a_text_as_rows_of_tokens_began(runs):
    base, of_tokens, of_chats = (
        AutoTokenizer.from_pretrained(runs / n) for n in ("base", "tokens/model", "chat/model")
    )
    plain = base("hello").input_ids
    assert of_tokens("hello").input_ids == [base.bos_token_id, *plain]
    assert of_chats("hello").input_ids == plain


def test_the_card_says_what_was_learned(runs):
    card = ModelCard.load(runs / "chat/model/README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["label-smoothing", "sft"],
    }
    metrics = [json.loads(line) for line in (runs / "chat/metrics.jsonl").read_text().splitlines()]
    first, *_, last = [row for row in metrics if "eval_nll" in row]
    for told in (
        "ε = 0.1",
        "chat.jsonl | 20 rows",
        "18 rows to train on, 2 held out (messages)",
        "60 (20.00 epochs), 8 rows each",
        f"| 0 | {first['eval_nll']:.4f} |",
        f"| 60 (this model) | {last['eval_nll']:.4f} |",
        '[{"role": "user", "content": "PROMPT"}]',
        "UnsmoothLogits(0.1)",
        "vllm serve MODEL",
    ):
        assert told in card.text
    assert str(runs) not in card.content
    text = (runs / "tokens/model/README.md").read_text()
    assert "begins a text with `<s>`" in text and 'generator("PROMPT"' in text
