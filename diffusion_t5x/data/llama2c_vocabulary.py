"""The vocabulary in llama2.c's tokenizer files.

A file has an int32 (the longest piece's bytes), then for each id a float32 score, an int32 length and the piece; all
little endian. Ids 0, 1 and 2 are unknown, BOS and EOS, 3 to 258 the bytes `<0x00>` to `<0xFF>`, the others pieces of
text (github.com/karpathy/llama2.c, tokenizer.py).
"""

import heapq
import itertools
import pathlib
import re
import struct
from collections.abc import Sequence

import numpy as np

from diffusion_t5x.data.vocabulary import ReadVocabulary
from diffusion_t5x.errors import UserError

_FIRST_BYTE, _FIRST_PIECE = 3, 259
# What llama2.c takes for a character: any byte, and up to three continuation bytes.
_CHARACTER = re.compile(rb".[\x80-\xbf]{0,3}", re.DOTALL)


class Llama2cVocabulary(ReadVocabulary):
    """Encodes and decodes like llama2.c's run.c, without BOS: autoregressive models read BOS as their start token.

    The unknown token is never written, because all text falls back to bytes; its id 0 is pad here. llama2.c's models
    end a text with the BOS of the next one, and decoding stops there.

    `contents` are the file's bytes.

    Raises:
      UserError: it cannot be read or has another format.
    """

    bos_id, eos_id, unk_id, puts_space = 1, 2, 0, True

    def __init__(self, path: str):
        self.file = path
        try:
            self.contents = pathlib.Path(path).expanduser().read_bytes()
        except OSError as error:
            raise UserError(
                f"Cannot read the tokenizer file {path}: {error.strerror}. Gin files name it by TOKENIZER_FILE or "
                "VOCABULARY_FILE."
            ) from error
        self._pieces, self._scores = _parse(self.contents, path)
        self.vocab_size = len(self._pieces)
        # Backwards: of equal pieces the first one counts. What looks like a special id or a byte is text to be encoded.
        self._ids = {self._pieces[i]: i for i in range(len(self._pieces) - 1, _FIRST_PIECE - 1, -1)}
        if b" " not in self._ids:
            raise UserError(f"{path} is not a tokenizer that llama2.c could use: it has no piece for a space.")

    def is_text(self) -> np.ndarray:
        text = np.ones(self.vocab_size, bool)
        text[[self.unk_id, self.bos_id]] = False
        return text

    def piece(self, token: int) -> bytes:
        if _FIRST_BYTE <= token < _FIRST_PIECE:
            return bytes([token - _FIRST_BYTE])
        piece = self._pieces[token]
        return piece.strip() if token < _FIRST_BYTE else piece

    def encode_part(self, text: str, begins: bool) -> list[int]:
        return self._to_ids(text.encode(), begins)

    def _to_ids(self, text: bytes, begins: bool = True) -> list[int]:
        """Encodes a text: starts from characters or bytes, then repeatedly joins the pair whose piece scores best.

        The leftmost of equally good pairs wins. A heap finds it; outdated pairs in the heap are ignored.
        """
        if not text:
            return []
        ids = []
        start = [b" "] if begins else []  # every text begins with a space, as SentencePiece has it
        for character in start + _CHARACTER.findall(text):
            known = self._ids.get(character)
            ids += [byte + _FIRST_BYTE for byte in character] if known is None else [known]
        before, after = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))
        pairs: list[tuple[float, int, int, int, int, int]] = []

        def offer(left: int) -> None:
            if left < 0 or (right := after[left]) == len(ids):
                return
            joined = self._ids.get(self._pieces[ids[left]] + self._pieces[ids[right]])
            if joined is not None:
                heapq.heappush(pairs, (-self._scores[joined], left, ids[left], right, ids[right], joined))

        for left in range(len(ids)):
            offer(left)
        while pairs:
            _, left, left_id, right, right_id, joined = heapq.heappop(pairs)
            if (ids[left], after[left], ids[right]) != (left_id, right, right_id):
                continue
            ids[left], ids[right] = joined, -1
            after[left] = after[right]
            if after[left] < len(ids):
                before[after[left]] = left
            offer(before[left])
            offer(left)
        return [token for token in ids if token >= 0]

    def _to_bytes(self, ids: Sequence[int]) -> bytes:
        ids = list(itertools.takewhile(lambda token: token != self.bos_id, ids))
        text = b"".join(self.piece(token) for token in ids if token >= _FIRST_BYTE)
        begins_with_a_piece = bool(ids) and ids[0] >= _FIRST_PIECE
        return text.removeprefix(b" ") if begins_with_a_piece else text


def _parse(contents: bytes, path: str) -> tuple[list[bytes], list[float]]:
    """Returns pieces and scores by id."""
    pieces, scores, at = [], [], 4
    while at + 8 <= len(contents):
        score, length = struct.unpack_from("<fi", contents, at)
        if not 0 <= length <= len(contents) - at - 8:
            break
        scores.append(score)
        pieces.append(contents[at + 8 : at + 8 + length])
        at += 8 + length
    if pieces[_FIRST_BYTE:_FIRST_PIECE] != [f"<0x{byte:02X}>".encode() for byte in range(256)]:
        raise UserError(f"{path} is not a llama2.c tokenizer file: ids 3 to 258 are not the bytes <0x00> to <0xFF>.")
    if at != len(contents):
        raise UserError(f"{path} is truncated, or not a tokenizer file: piece {len(pieces)} does not end in it.")
    return pieces, scores
