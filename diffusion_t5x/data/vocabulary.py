"""Base of the project's own vocabularies: SeqIO's interface and more, without SeqIO; TensorFlow comes with graphs."""

import abc
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import seqio
    import tensorflow as tf


class Vocabulary(abc.ABC):
    """A vocabulary that a `seqio.Feature` takes as one of SeqIO's, plus the methods that the framework needs.

    Attributes:
      contents: bytes that tell it from others.
      file: the path that it was made from; None without one.
      extra_ids: how many of the ids are sentinels that were put behind a model's own.
      bos_id, eos_id, pad_id, unk_id: special ids; None where there is none.
      puts_space: a text's first piece has a space in front that is not the text's.
    """

    file: str | None = None
    extra_ids: int = 0

    @property
    @abc.abstractmethod
    def contents(self) -> bytes: ...

    @property
    def bos_id(self) -> int | None:
        return None

    @property
    @abc.abstractmethod
    def eos_id(self) -> int: ...

    @property
    def mask_id(self) -> int | None:
        """The id of MASK, if the vocabulary names one; it may lie behind all others."""
        return None

    @property
    def pad_id(self) -> int:
        return 0

    @property
    @abc.abstractmethod
    def unk_id(self) -> int | None: ...

    @property
    @abc.abstractmethod
    def puts_space(self) -> bool: ...

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of ids."""

    @abc.abstractmethod
    def is_text(self) -> np.ndarray:
        """bool `[vocab_size]`: True for ids that are pieces of text."""

    def sentinel_ids(self) -> Sequence[int]:
        """The ids of `<extra_id_0>`, `<extra_id_1>` ..., as far as they exist."""
        return []

    @abc.abstractmethod
    def piece(self, token: int) -> bytes:
        """Returns the bytes of one id; a byte may be only part of a character. Special ids have names such as "<s>"."""

    @abc.abstractmethod
    def encode_part(self, text: str, begins: bool) -> list[int]:
        """Encodes a part of a text, with a space in front only if it `begins` the text."""

    def source(self) -> dict[str, Any] | None:
        """Returns the arguments of `vocabulary_files.vocabulary` that make this vocabulary; None if there are none."""
        return {"file": self.file, "extra_ids": self.extra_ids} if self.file else None

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, without EOS."""
        return self._to_ids(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, up to the first EOS."""
        return self._to_bytes(self._up_to_end(ids)).decode(errors="replace")

    # Stateless: else no position in data that are tokenised on the way could be saved.
    def encode_tf(self, text: "tf.Tensor") -> "tf.Tensor":
        """int32 `[tokens]`: as `encode`, in a TensorFlow graph."""
        import tensorflow as tf

        def encode(texts: np.ndarray) -> np.ndarray:  # a list of one: alone, a text comes as bytes or as an array
            return np.array(self._to_ids(texts[0]), np.int32)

        return tf.ensure_shape(tf.numpy_function(encode, [tf.expand_dims(text, 0)], tf.int32, stateful=False), [None])

    def decode_tf(self, ids: "tf.Tensor") -> "tf.Tensor":
        """The texts of int32 `[..., tokens]`: as `decode`, in a TensorFlow graph."""
        import tensorflow as tf

        def decode(rows: np.ndarray) -> np.ndarray:
            rows = rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])
            return np.array([self._to_bytes(self._up_to_end(row.tolist())) for row in rows], object)

        texts = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        return tf.reshape(texts, tf.shape(ids)[:-1])

    def _to_ids(self, text: bytes) -> list[int]:
        """Returns the tokens of a UTF-8 text."""
        return self.encode_part(text.decode(errors="replace"), begins=True)

    @abc.abstractmethod
    def _to_bytes(self, ids: Sequence[int]) -> bytes:
        """Returns the text of ids as UTF-8, if it is valid."""

    def _up_to_end(self, ids: Iterable[int]) -> list[int]:
        """Returns the ids up to the first EOS, those that the vocabulary does not have as unknown ones."""
        known = [token if token < self.vocab_size or self.unk_id is None else self.unk_id for token in map(int, ids)]
        return known[: known.index(self.eos_id) + 1] if self.eos_id in known else known

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Vocabulary) and self.contents == other.contents)


class ReadVocabulary(Vocabulary):
    """A vocabulary that knows its ids once it is made: its `__init__` sets what differs from these."""

    contents: bytes = b""
    vocab_size: int = 0
    bos_id: int | None = None
    eos_id: int = 1
    pad_id: int = 0
    unk_id: int | None = None
    mask_id: int | None = None


AnyVocabulary: TypeAlias = "Vocabulary | seqio.Vocabulary"


def own(vocabulary: AnyVocabulary) -> Vocabulary:
    """Returns the vocabulary itself, or this project's view of one of SeqIO's.

    Raises:
      UserError: it has no EOS, or is of a kind whose ids nothing is known of.
    """
    if isinstance(vocabulary, Vocabulary):
        return vocabulary
    from diffusion_t5x.data import seqio_vocabularies

    return seqio_vocabularies.own(vocabulary)
