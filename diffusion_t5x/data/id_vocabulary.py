"""Ids as text, for a model without a tokenizer: a vocabulary that its config.json describes."""

import pathlib
from typing import Any

from diffusion_t5x.data import tokenizer_files
from diffusion_t5x.data.plain_vocabularies import Ids
from diffusion_t5x.errors import UserError

CONFIG = "config.json"


class IdVocabulary(Ids):
    """Texts are ids in decimal, separated by spaces: "17 3 250".

    Args:
      path: a model's config.json, with `vocab_size`, `eos_token_id` and maybe the ids of pad, BOS and MASK. Where it
        names no pad token, EOS pads; where it names no EOS, the pad token ends texts (LLaDA2).
      mask_id: of MASK; None takes the one that the file names.

    Raises:
      UserError: it cannot be read, or does not name these.
    """

    def __init__(self, path: str, mask_id: int | None = None):
        said = tokenizer_files.read(pathlib.Path(path).expanduser())
        size, pad_id = said.get("embedding_size") or said.get("vocab_size"), _first(said.get("pad_token_id"))
        eos_id = pad_id if said.get("eos_token_id") is None else _first(said["eos_token_id"])
        if not isinstance(size, int) or eos_id is None:
            raise UserError(
                f"{path} cannot be used as a vocabulary: it needs vocab_size and eos_token_id. Put the model's "
                "tokenizer beside it."
            )
        self.file = path
        self.bos_id = _first(said.get("bos_token_id"))
        self.mask_id = _first(said.get("mask_token_id")) if mask_id is None else mask_id
        super().__init__(size, eos_id, eos_id if pad_id is None else pad_id, self.bos_id, self.mask_id)

    def encode_part(self, text: str, begins: bool) -> list[int]:
        del begins
        words = text.split()
        for word in words:
            if not (word.isascii() and word.isdigit() and int(word) < self.vocab_size):
                raise UserError(
                    f"{self.file} knows only ids from 0 to {self.vocab_size - 1}, in decimal and separated by spaces, "
                    f"and {word[:40]!r} is none: put the model's tokenizer beside it to read other texts."
                )
        return [int(word) for word in words]


def _first(token: Any) -> int | None:
    """An id; of a list of them, the first."""
    token = token[0] if isinstance(token, list) and token else token
    return token if isinstance(token, int) and not isinstance(token, bool) and token >= 0 else None
