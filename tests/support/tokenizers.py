"""Tokenizers of the kinds that people have, trained on a few words, and chat templates to go with them."""

import io
import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

WORDS = ["hello yes no, one two three. <|user|> <|assistant|> system"] * 50
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(eos: str, bos: str | None = None, template: str | None = CHATML) -> PreTrainedTokenizerBase:
    """Byte-level BPE, as GPT-2's, Llama 3's and Qwen's: it puts nothing in front."""
    backend = Tokenizer.from_str(_byte_level_pieces(eos, bos))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos, chat_template=template)


@cache
def _byte_level_pieces(eos: str, bos: str | None) -> str:
    special = sorted({"<|im_start|>", "<|im_end|>", "<|endoftext|>", eos, *([bos] if bos else [])})
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(WORDS, trainer)
    return tokenizer.to_str()


@cache
def sentencepiece_model() -> Path:
    """Train SentencePiece as Llama 2 did: a dummy prefix, and bytes for what is unknown."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS), model_writer=model, model_type="bpe", vocab_size=330,
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path = Path(mkdtemp(prefix="sentencepiece-")) / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def llama_2_like(template: str | None = None) -> PreTrainedTokenizerBase:
    """SentencePiece's pieces in a fast tokenizer, with </s> as EOS."""
    folder = sentencepiece_model().parent
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    return tokenizer


def without_offsets(template: str | None = None) -> PreTrainedTokenizerBase:
    """SentencePiece itself, which does not tell where a token stands in the text."""
    tokenizer = SentencePieceBackend(
        vocab_file=str(sentencepiece_model()), eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def learned_texts(row, tokenizer) -> list[str]:
    """Return what a row's labels spell, run by run."""
    runs: list[list[int]] = [[]]
    for label in row["labels"]:
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]
