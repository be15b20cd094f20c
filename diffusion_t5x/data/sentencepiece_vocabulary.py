"""SentencePiece models, optionally with tokens added after their pieces. Imports SeqIO: import it inside functions."""

import functools
import pathlib

import seqio
import tensorflow as tf
import tensorflow_text

from diffusion_t5x.data import tokenizer_files
from diffusion_t5x.data.silence import silent_stderr
from diffusion_t5x.data.tokenizer_files import AddedToken
from diffusion_t5x.errors import UserError


class SentencePieceVocabulary(seqio.SentencePieceVocabulary):
    """SeqIO's vocabulary with one TensorFlow tokenizer for all graphs; SeqIO loads the model again per iterator."""

    @property
    def tf_tokenizer(self):
        return _tf_tokenizer(self.sp_model)


@functools.cache
def _tf_tokenizer(model: bytes):
    # TensorFlow Text logs from a copy of SentencePiece whose level cannot be set.
    with tf.init_scope(), silent_stderr(b" LOG(INFO) "):
        return tensorflow_text.SentencepieceTokenizer(model=model)


class AddedTokensVocabulary(SentencePieceVocabulary):
    """A SentencePiece model followed by SeqIO's sentinels and by the tokens that files beside the model add.

    Args:
      path: the model's file.
      extra_ids: number of sentinels.
      added: by id, the added tokens' contents, and True for special ones. Ids between them stand for nothing.
    """

    def __init__(self, path: str, extra_ids: int, added: tuple[tuple[int, AddedToken], ...]):
        super().__init__(path, extra_ids=extra_ids)
        self._added = added

    @property
    def added(self) -> tuple[tuple[int, AddedToken], ...]:
        return self._added

    @property
    def num_before(self) -> int:
        """Number of ids before the added tokens: the model's own and the sentinels."""
        return super().tokenizer.GetPieceSize()

    @property
    def sp_model(self) -> bytes:
        return self._with_added[0]

    @property
    def tokenizer(self):
        return self._with_added[1]

    @property
    def _with_added(self):
        return _with_added(super().sp_model, self._added)


@functools.lru_cache(maxsize=4)
def _with_added(contents: bytes, added: tuple[tuple[int, AddedToken], ...]):
    """Returns the model's contents with the added tokens as pieces, and its processor."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(contents)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    own = {piece.piece: number for number, piece in enumerate(model.pieces)}
    for number, token in added:
        if token.content in own:  # an added token comes before a piece of that text
            model.pieces[own[token.content]].MergeFrom(kinds(piece=f"<unused_{own[token.content]}>", type=kinds.UNUSED))
        while len(model.pieces) < number:
            model.pieces.add(piece=f"<unused_{len(model.pieces)}>", score=0.0, type=kinds.UNUSED)
        # Matched in a text as it stands, as SeqIO's sentinels are.
        model.pieces.add(piece=token.content, score=0.0, type=kinds.USER_DEFINED)
    contents = model.SerializeToString()
    return contents, sentencepiece.SentencePieceProcessor(model_proto=contents)


def with_added_tokens(own: seqio.SentencePieceVocabulary, extra_ids: int) -> seqio.SentencePieceVocabulary:
    """Returns a SentencePiece model's vocabulary with sentinels and the tokens that files beside it add.

    Without added tokens it is SeqIO's own. An added token in place of a sentinel means that there are no sentinels.

    Args:
      own: the model alone.
      extra_ids: number of sentinels after its pieces, if any.

    Raises:
      UserError: an added token has the id of another piece, or one beyond the maximum for the files.
    """
    path = pathlib.Path(own.sentencepiece_model_file)
    size, model = own.vocab_size, own.tokenizer
    tokens = tokenizer_files.in_tokenizer(path.parent / tokenizer_files.TOKENIZER)
    tokens |= tokenizer_files.added_tokens(path.parent)
    tokenizer_files.check_room(tokens, [path, *{token.file for token in tokens.values()}], path.parent)
    for number, token in tokens.items():
        if number < size and token.content not in (piece := model.IdToPiece(number), piece.removeprefix("▁")):
            raise UserError(
                f"{token.file}: {token.content!r} has the id {number}, which is {piece!r} in {path}: take out the file "
                "that is wrong."
            )
    behind = {number: token for number, token in sorted(tokens.items()) if number >= size}
    for token in behind.values():
        there = model.PieceToId(token.content)
        if model.IdToPiece(there) == token.content and (model.IsControl(there) or model.IsUnknown(there)):
            raise UserError(f"{token.file}: {token.content!r} is a special piece of {path} already: take it out.")
    sentinels = {size + extra_ids - 1 - number: f"<extra_id_{number}>" for number in range(extra_ids)}
    if any(number in sentinels and sentinels[number] != token.content for number, token in behind.items()):
        sentinels = {}
    added = tuple((number, token) for number, token in behind.items() if number not in sentinels)
    if not added:
        return SentencePieceVocabulary(str(path), extra_ids=extra_ids) if extra_ids else own
    return AddedTokensVocabulary(str(path), len(sentinels), added)
