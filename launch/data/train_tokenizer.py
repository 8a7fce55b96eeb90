"""A tokenizer trained on the data itself, for runs that start from no checkpoint.

SentencePiece learns the pieces and `tokenizers` applies them. Pieces hold real spaces, not SentencePiece's
U+2581, so there is no dummy prefix to strip, a U+2581 in the text survives, and
encode(a) + encode(b) always decodes to a + b.
"""

import io
import logging
from collections.abc import Iterable

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from launch.data.records import DataError

SPECIAL_PIECES = ("<unk>", "<s>", "</s>", "<pad>")
SPACE_MARK = "\u2581"
SMALLEST_VOCABULARY = len(SPECIAL_PIECES) + 256

log = logging.getLogger(__name__)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """BPE with byte fallback, lossless for any text, the same for the same texts.

    Where the texts hold too few pieces the vocabulary is smaller than `vocab_size`, with a warning.
    Raises DataError for no text or a vocabulary that cannot hold bytes and characters.
    """
    return tokenizer_of(learn_pieces(texts, vocab_size), vocab_size)


def tokenizer_of(pieces: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Make the tokenizer of pieces that were learned; `vocab_size` is how many were asked for."""
    if len(pieces) < vocab_size:
        log.warning("the texts support %d pieces, not the %d requested", len(pieces), vocab_size)
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocab, _merges(pieces, vocab), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in SPECIAL_PIECES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def learn_pieces(texts: Iterable[str], vocab_size: int) -> list[str]:
    """SentencePiece's vocabulary in rank order, spaces unescaped."""
    # SentencePiece's own limit is on bytes per sentence and it refuses NUL; both only concern learning.
    sentences = [text.replace("\0", "") for text in texts]
    if not any(sentence.strip() for sentence in sentences):
        raise DataError("A tokenizer needs text to be trained on, and the training rows have none.")
    if vocab_size <= SMALLEST_VOCABULARY:
        raise DataError(
            f"Expected a vocabulary of more than {SMALLEST_VOCABULARY} pieces (256 bytes and "
            f"{len(SPECIAL_PIECES)} special ones), got {vocab_size}; ask for more."
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 24,
            num_threads=1,
            unk_id=0, bos_id=1, eos_id=2, pad_id=3, pad_piece="<pad>",
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise DataError(
            f"SentencePiece could not learn {vocab_size} pieces from these texts: {error}; "
            "try another vocabulary size."
        ) from error
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.getvalue())
    return [piece.piece.replace(SPACE_MARK, " ") for piece in proto.pieces]


def _merges(pieces: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best-ranked result first, as SentencePiece applies them."""
    merges = []
    for piece in pieces:
        # Byte pieces <0x..> need no exception: split_digits never joins their 0 to anything.
        if len(piece) < 2 or piece in SPECIAL_PIECES:
            continue
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        found = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(found, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges
