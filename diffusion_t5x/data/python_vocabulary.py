"""Base of vocabularies whose tokenizers TensorFlow calls back. Imports SeqIO: import it inside functions."""

import abc
from collections.abc import Sequence

import numpy as np
import seqio
import tensorflow as tf


class PythonVocabulary(seqio.Vocabulary):
    """Base class of the project's own vocabularies; adds the methods that the framework needs to SeqIO's.

    Attributes:
      contents: bytes that identify the vocabulary.
      file: the path that it was read from.
    """

    contents: bytes
    file: str

    @property
    @abc.abstractmethod
    def puts_space(self) -> bool:
        """True if the tokenizer puts a space in front of a text."""

    @abc.abstractmethod
    def is_text(self) -> np.ndarray:
        """bool `[vocab_size]`: True for ids that are pieces of text."""

    @property
    def mask_id(self) -> int | None:
        """The id of MASK, if the vocabulary names one; it may lie behind all others."""
        return None

    def sentinel_ids(self) -> list[int]:
        """The ids of `<extra_id_0>`, `<extra_id_1>` ..., as far as they exist."""
        return []

    @abc.abstractmethod
    def piece(self, token: int) -> bytes:
        """Returns the bytes of one id; a byte may be only part of a character. Special ids have names such as "<s>"."""

    @abc.abstractmethod
    def encode_part(self, text: str, begins: bool) -> list[int]:
        """Encodes a part of a text, with a space in front only if it `begins` the text."""

    @abc.abstractmethod
    def _to_ids(self, text: bytes) -> list[int]:
        """Returns the tokens of a UTF-8 text."""

    @abc.abstractmethod
    def _to_bytes(self, ids: Sequence[int]) -> bytes:
        """Returns the text of ids as UTF-8, if it is valid."""

    def _encode(self, s: str) -> list[int]:
        return self._to_ids(s.encode())

    def _decode(self, ids: Sequence[int]) -> str:
        return self._to_bytes(ids).decode(errors="replace")

    # Stateless: else no position in data that are tokenised on the way could be saved.
    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        def encode(texts: np.ndarray) -> np.ndarray:  # a list of one: alone, a text comes as bytes or as an array
            return np.array(self._to_ids(texts[0]), np.int32)

        return tf.ensure_shape(tf.numpy_function(encode, [tf.expand_dims(s, 0)], tf.int32, stateful=False), [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        def decode(rows: np.ndarray) -> np.ndarray:
            return np.array([self._to_bytes(row.tolist()) for row in rows.reshape(-1, rows.shape[-1])], object)

        texts = tf.numpy_function(decode, [ids], tf.string, stateful=False)
        return tf.reshape(texts, tf.shape(ids)[:-1])

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.contents == other.contents
