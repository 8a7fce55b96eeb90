"""Which characters the tokens of a byte-level tokenizer stand for: joined, the bytes of its tokens are the text.

Offsets cost a tokenizer a quarter of its time, and some trim blanks off them.
"""

import numpy
from tokenizers import decoders, models, normalizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
CONTINUES = 0x80  # the two high bits of a byte that begins no character
PROBES = ("a", " é\n1")
UNICODE_FORMS = (normalizers.NFC, normalizers.NFD, normalizers.NFKC, normalizers.NFKD)  # which leave ASCII as it is


class TokenBytes(dict[int, bytes]):
    """The bytes of each token of a tokenizer with byte-level pieces, looked up when they are first asked for."""

    def __init__(self, tokenizer):
        backend = self._backend = tokenizer.backend_tokenizer
        self._added = {token: added.content for token, added in backend.get_added_tokens_decoder().items()}
        self._lengths = numpy.zeros(len(tokenizer), numpy.int32)  # 0: not asked for yet
        # Where a token cannot stand for fewer bytes than it has, lengths that add up to the text's prove its places.
        self._exact = (
            isinstance(backend.normalizer, (type(None), *UNICODE_FORMS))
            and isinstance(backend.model, models.BPE)
            and not (backend.model.unk_token or backend.model.byte_fallback)
            and not (backend.model.continuing_subword_prefix or backend.model.end_of_word_suffix)
        )

    @classmethod
    def of(cls, tokenizer) -> "TokenBytes | None":
        """Return those of a tokenizer, None for one whose tokens are not the bytes of its texts."""
        if not isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
            return None
        found = cls(tokenizer)
        for text in PROBES:
            try:
                ids = found._backend.encode(text, add_special_tokens=False).ids
            except Exception:  # as it will refuse other texts, which says why
                return None
            if found._joined(ids) != text.encode("utf-8"):
                return None
        return found

    def __missing__(self, token: int) -> bytes:
        if token in self._added:
            found = self._added[token].encode("utf-8")
        else:
            found = bytes(BYTES[character] for character in self._backend.id_to_token(token))
        if not found:
            raise KeyError(token)
        self._make_room(token)
        self[token], self._lengths[token] = found, len(found)
        return found

    def spans(self, ids: numpy.ndarray, text: str) -> numpy.ndarray | None:
        """Return the characters of `text` that each token stands for, int32 [tokens, 2].

        Tokens that share a character have it each. None if the tokens joined are not the text.
        """
        self._make_room(int(ids.max(initial=0)))
        lengths, known = self._lengths[ids], self._exact and text.isascii()
        if not (known and lengths.all()):
            joined = self._joined(ids.tolist())
            if joined is None or (not known and joined != text.encode("utf-8")):
                return None
            lengths = self._lengths[ids]
        ends = lengths.cumsum(dtype=numpy.int32)
        if known:
            if (ends[-1] if len(ends) else 0) != len(text):
                return None
            return numpy.stack([ends - lengths, ends], axis=1)
        begins = (numpy.frombuffer(joined, numpy.uint8) & 0xC0) != CONTINUES
        begun = numpy.concatenate([[0], begins.cumsum(dtype=numpy.int32)])  # characters in the first bytes
        return numpy.stack([begun[ends - lengths + 1] - 1, begun[ends]], axis=1)

    def _make_room(self, token: int) -> None:
        if token >= len(self._lengths):  # there are gaps between the vocabulary's ids
            self._lengths = numpy.pad(self._lengths, (0, token + 1 - len(self._lengths)))

    def _joined(self, ids: list[int]) -> bytes | None:
        """Return the bytes of tokens, None if one of them is not made of bytes."""
        try:
            return b"".join(map(self.__getitem__, ids))
        except KeyError:
            return None
