"""SentencePiece models, optionally with sentinels and other tokens added after their pieces."""

import functools
import itertools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion_t5x.data import tokenizer_files
from diffusion_t5x.data.silence import silent_stderr
from diffusion_t5x.data.tokenizer_files import AddedToken
from diffusion_t5x.data.vocabulary import Vocabulary
from diffusion_t5x.errors import UserError

_SENTINEL = re.compile("▁?<extra_id_[0-9]+>")


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model followed by sentinels (numbered downwards, as T5's) and by the tokens that files add.

    The model is read on first use.

    Args:
      path: the model's file.
      extra_ids: number of sentinels.
      added: by id, the added tokens' contents, and True for special ones. Ids between them are unused.
    """

    def __init__(self, path: str, extra_ids: int = 0, added: tuple[tuple[int, AddedToken], ...] = ()):
        self.file = path
        self.extra_ids = extra_ids
        self.added = added

    @property
    def contents(self) -> bytes:
        """The model in its own form, with the sentinels and the added tokens."""
        return self._model[0]

    @property
    def tokenizer(self) -> Any:
        """Its `SentencePieceProcessor`."""
        return self._model[1]

    @functools.cached_property
    def _model(self) -> tuple[bytes, Any, int]:
        assert self.file is not None
        return _load(pathlib.Path(self.file).expanduser().read_bytes(), self.extra_ids, self.added)

    @property
    def bos_id(self) -> int | None:
        return self.tokenizer.bos_id() if self.tokenizer.bos_id() >= 0 else None

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_id()

    @property
    def unk_id(self) -> int:
        return self.tokenizer.unk_id()

    @property
    def puts_space(self) -> bool:
        return _puts_space(self.contents)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.GetPieceSize()

    def is_text(self) -> np.ndarray:
        model, ids = self.tokenizer, list(range(self.vocab_size))
        special = np.array([model.IsControl(ids), model.IsUnknown(ids), model.IsUnused(ids)]).any(0)
        # T5's sentinels stand behind the pieces; later vocabularies have them in the model itself.
        sentinel = np.array([bool(_SENTINEL.fullmatch(piece)) for piece in model.IdToPiece(ids)])
        text = ~(special | sentinel)
        text[[number for number, token in self.added if token.is_special]] = False
        return text

    def sentinel_ids(self) -> Sequence[int]:
        """Returns the last ids before the added tokens, as far as they are sentinels."""
        end = self._model[2]
        names = ((number, self.tokenizer.IdToPiece(end - 1 - number)) for number in range(end))
        found = itertools.takewhile(lambda x: x[1].removeprefix("▁") == f"<extra_id_{x[0]}>", names)
        return range(end - 1, end - 1 - sum(1 for _ in found), -1)

    def piece(self, token: int) -> bytes:
        name = self.tokenizer.IdToPiece(token)
        return bytes.fromhex(name[3:5]) if self.tokenizer.IsByte(token) else name.replace("▁", " ").encode()

    def encode_part(self, text: str, begins: bool) -> list[int]:
        """See `vocabularies.encode_part`.

        Raises:
          UserError: there is no piece for a character.
        """
        model, drops_spaces = _part_model(self.contents, begins)
        if drops_spaces:
            text = re.sub("▁+", " ", model.Normalize(text))
            text = text.removeprefix(" ") if begins else text
        tokens = model.EncodeAsIds(text)
        if self.unk_id in tokens:
            pieces = model.EncodeAsPieces(text)
            raise UserError(f"The vocabulary has no piece for {pieces[tokens.index(self.unk_id)]!r}.")
        return tokens

    def encode_tf(self, text: Any) -> Any:
        return tf_tokenizer(self.contents).tokenize(text)

    def _to_ids(self, text: bytes) -> list[int]:
        return self.tokenizer.EncodeAsIds(text.decode())

    def _to_bytes(self, ids: Sequence[int]) -> bytes:
        return self.tokenizer.DecodeIds(list(ids)).encode()


@functools.cache
def tf_tokenizer(model: bytes) -> Any:
    """TensorFlow's tokenizer of a SentencePiece model."""
    import tensorflow as tf
    import tensorflow_text

    # TensorFlow Text logs from a copy of SentencePiece whose level cannot be set.
    with tf.init_scope(), silent_stderr(b" LOG(INFO) "):
        return tensorflow_text.SentencepieceTokenizer(model=model)


@functools.lru_cache(maxsize=8)
def _load(contents: bytes, extra_ids: int, added: tuple[tuple[int, AddedToken], ...]) -> tuple[bytes, Any, int]:
    """Returns the model's contents with sentinels and the added tokens as pieces, its processor, the first added id."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    model = _proto(contents)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    for number in reversed(range(extra_ids)):
        model.pieces.add(piece=f"▁<extra_id_{number}>", score=0.0, type=kinds.USER_DEFINED)
    num_before = len(model.pieces)
    own = {piece.piece: number for number, piece in enumerate(model.pieces)}
    for number, token in added:
        if token.content in own:  # an added token comes before a piece of that text
            model.pieces[own[token.content]].MergeFrom(kinds(piece=f"<unused_{own[token.content]}>", type=kinds.UNUSED))
        while len(model.pieces) < number:
            model.pieces.add(piece=f"<unused_{len(model.pieces)}>", score=0.0, type=kinds.UNUSED)
        # Matched in a text as it stands, as the sentinels are.
        model.pieces.add(piece=token.content, score=0.0, type=kinds.USER_DEFINED)
    contents = model.SerializeToString()
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(contents)
    return contents, processor, num_before


@functools.lru_cache(maxsize=4)
def _part_model(contents: bytes, begins: bool) -> tuple[Any, bool]:
    """Returns the SentencePiece model that keeps all spaces, and True if the vocabulary itself drops some."""
    import sentencepiece

    proto = _proto(contents)
    drops_spaces = proto.normalizer_spec.remove_extra_whitespaces
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.add_dummy_prefix &= begins
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString()), drops_spaces


@functools.lru_cache(maxsize=4)
def _puts_space(contents: bytes) -> bool:
    return _proto(contents).normalizer_spec.add_dummy_prefix


def _proto(contents: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(contents)


def with_added_tokens(own: SentencePieceVocabulary, extra_ids: int) -> SentencePieceVocabulary:
    """Returns a SentencePiece model's vocabulary with sentinels and the tokens that files beside it add.

    An added token in place of a sentinel means that there are no sentinels.

    Args:
      own: only the model.
      extra_ids: number of sentinels after its pieces, if any.

    Raises:
      UserError: an added token has the id of another piece, or one beyond the maximum for the files.
    """
    assert own.file is not None
    path = pathlib.Path(own.file)
    size, model = own.vocab_size, own.tokenizer
    tokens = tokenizer_files.in_tokenizer(path.parent / tokenizer_files.TOKENIZER)
    tokens |= tokenizer_files.added_tokens(path.parent)
    tokenizer_files.check_room(tokens, [path, *{token.file for token in tokens.values()}], path.parent)
    for number, token in tokens.items():
        if number < size and token.content not in (piece := model.IdToPiece(number), piece.removeprefix("▁")):
            raise UserError(
                f"{token.file}: {token.content!r} has the id {number}, which is {piece!r} in {path}: remove the wrong "
                "file."
            )
    behind = {number: token for number, token in sorted(tokens.items()) if number >= size}
    for token in behind.values():
        there = model.PieceToId(token.content)
        if model.IdToPiece(there) == token.content and (model.IsControl(there) or model.IsUnknown(there)):
            raise UserError(f"{token.file}: {token.content!r} is a special piece of {path} already: remove it.")
    sentinels = {size + extra_ids - 1 - number: f"<extra_id_{number}>" for number in range(extra_ids)}
    if any(number in sentinels and sentinels[number] != token.content for number, token in behind.items()):
        sentinels = {}
    added = tuple((number, token) for number, token in behind.items() if number not in sentinels)
    return SentencePieceVocabulary(str(path), len(sentinels), added)
