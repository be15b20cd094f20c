"""Vocabularies that need no file: bytes, and ids without texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion_t5x.data.vocabulary import ReadVocabulary
from diffusion_t5x.errors import UserError

_SPECIAL = 3  # pad, EOS and unknown come first


class ByteVocabulary(ReadVocabulary):
    """UTF-8 bytes with the ids of SeqIO's class of that name (ByT5, arXiv 2105.13626), and sentinels behind them."""

    unk_id, puts_space = 2, False

    def __init__(self, extra_ids: int = 0):
        self.extra_ids = extra_ids
        self.vocab_size = _SPECIAL + 256 + extra_ids
        self.contents = f"bytes {self.vocab_size} {extra_ids}".encode()

    def is_text(self) -> np.ndarray:
        return np.arange(self.vocab_size) != self.unk_id

    def sentinel_ids(self) -> Sequence[int]:
        return range(self.vocab_size - 1, self.vocab_size - 1 - self.extra_ids, -1)

    def piece(self, token: int) -> bytes:
        if token >= _SPECIAL + 256:
            return f"<extra_id_{self.vocab_size - 1 - token}>".encode()
        return b"<unk>" if token == self.unk_id else bytes([token - _SPECIAL])

    def encode_part(self, text: str, begins: bool) -> list[int]:
        return self.encode(text)

    def source(self) -> dict[str, Any]:
        return {"file": None, "extra_ids": self.extra_ids}

    def _to_ids(self, text: bytes) -> list[int]:
        return [byte + _SPECIAL for byte in text]

    def _to_bytes(self, ids: Sequence[int]) -> bytes:
        text = bytes(token - _SPECIAL for token in ids if _SPECIAL <= token < _SPECIAL + 256)
        return text.decode(errors="ignore").encode()


class Ids(ReadVocabulary):
    """Ids in decimal for texts.

    Args:
      size: number of ids.
      eos_id, pad_id: special ids. Pad need not be 0: in many vocabularies 0 is a piece of text.
      *others: more ids that tell it from others.
    """

    puts_space = True

    def __init__(self, size: int, eos_id: int, pad_id: int, *others: int | None):
        self.vocab_size, self.eos_id, self.pad_id = size, eos_id, pad_id
        self.contents = " ".join(map(str, ("ids", size, eos_id, pad_id, *others))).encode()

    def is_text(self) -> np.ndarray:
        return np.ones(self.vocab_size, bool)

    def piece(self, token: int) -> bytes:
        return f" {token}".encode()

    def _to_bytes(self, ids: Sequence[int]) -> bytes:
        return " ".join(map(str, ids)).encode()


class TokenIdVocabulary(Ids):
    """Ids for their own sake: no text can be encoded."""

    def __init__(self, size: int, eos_id: int, pad_id: int = 0):
        super().__init__(size, eos_id, pad_id)

    def encode_part(self, text: str, begins: bool) -> list[int]:
        raise UserError("The vocabulary has only ids: texts cannot be encoded with it.")
