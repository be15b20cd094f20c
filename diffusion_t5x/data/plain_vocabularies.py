"""Vocabularies that need no file: bytes, and ids without texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion_t5x.data.vocabulary import Vocabulary
from diffusion_t5x.errors import UserError

_SPECIAL = 3  # pad, EOS and unknown come first


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes with the ids of SeqIO's class of that name (ByT5, arXiv 2105.13626), and sentinels behind them."""

    contents = b""
    eos_id, unk_id, puts_space = 1, 2, False

    def __init__(self, extra_ids: int = 0):
        self.extra_ids = extra_ids
        self.contents = f"bytes {self.vocab_size} {extra_ids}".encode()

    @property
    def vocab_size(self) -> int:
        return _SPECIAL + 256 + self.extra_ids

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


class TokenIdVocabulary(Vocabulary):
    """Ids for their own sake, with a pad id that need not be 0: in many vocabularies 0 is a piece of text."""

    contents = b""
    eos_id, pad_id = 1, 0
    unk_id, puts_space = None, True

    def __init__(self, size: int, eos_id: int, pad_id: int = 0):
        self._size, self.eos_id, self.pad_id = size, eos_id, pad_id
        self.contents = f"ids {size} {eos_id} {pad_id}".encode()

    @property
    def vocab_size(self) -> int:
        return self._size

    def is_text(self) -> np.ndarray:
        return np.ones(self._size, bool)

    def piece(self, token: int) -> bytes:
        return f" {token}".encode()

    def encode_part(self, text: str, begins: bool) -> list[int]:
        raise UserError("The vocabulary has only ids: texts cannot be encoded with it.")

    def _to_ids(self, text: bytes) -> list[int]:
        return self.encode_part(text.decode(errors="replace"), begins=True)

    def _to_bytes(self, ids: Sequence[int]) -> bytes:
        return " ".join(map(str, ids)).encode()
