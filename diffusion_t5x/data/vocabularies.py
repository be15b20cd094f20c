"""What the models, objectives and decoders know of a vocabulary: its size and the ids that mean something."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_t5x.errors import UserError

if TYPE_CHECKING:
    import seqio


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """The special ids of a vocabulary and the range that uniform noise is drawn from. Hashable, free of TensorFlow.

    Attributes:
      size: number of ids, MASK included. The embedding has at least so many rows.
      pad_id: padding; inside a target canvas it is a token like any other.
      eos_id: end of sequence.
      mask_id: the absorbing token of masked diffusion: an id of its own that no text encodes to.
      start_id: what an autoregressive model reads before the first token (pad in T5 vocabularies).
      noise_ranges: half-open, disjoint, ascending id ranges `((first, last + 1), ...)` of the noise vocabulary: all
        that a target may hold (real pieces, pad, EOS) and nothing else (no sentinel, MASK, BOS, unknown, unused id).
      name: which vocabulary this is, for people.
      fingerprint: hash of its contents; a checkpoint trained with another one is refused.
    """

    size: int
    pad_id: int
    eos_id: int
    mask_id: int
    start_id: int
    noise_ranges: tuple[tuple[int, int], ...]
    name: str = ""
    fingerprint: str = ""

    def noise_ids(self) -> np.ndarray:
        """int32 `[number of noise ids]`: the noise vocabulary in ascending order."""
        return np.concatenate([np.arange(first, end, dtype=np.int32) for first, end in self.noise_ranges])

    def sample_noise(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Ids drawn uniformly from the noise vocabulary, int32 `[*shape]`."""
        ids = self.noise_ids()
        return jnp.asarray(ids)[jax.random.randint(key, shape, 0, len(ids))]

    def describe(self) -> dict[str, str | int]:
        """What a checkpoint keeps of the vocabulary it was trained with."""
        return {"name": self.name, "size": self.size, "mask_id": self.mask_id, "fingerprint": self.fingerprint}

    def check_same(self, described: Mapping[str, str | int], path: str) -> None:
        """Checks that the checkpoint at `path`, whose metadata hold `described`, was trained with this vocabulary.

        Raises:
          UserError: another vocabulary.
        """
        if dict(described) != self.describe():
            raise UserError(
                f"{path} was trained with another vocabulary ({_sentence(described)}) than the task's "
                f"({_sentence(self.describe())}): choose a task with the checkpoint's vocabulary or another checkpoint."
            )


def _sentence(described: Mapping[str, str | int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in described.items())


def token_ids(vocabulary: "seqio.Vocabulary") -> TokenIds:
    """What diffusion has to know of a SeqIO vocabulary. MASK gets the first id behind the vocabulary's own.

    The noise vocabulary is what a target may hold: pieces (byte-fallback pieces too), pad and EOS. Sentinels, unknown,
    control and unused ids are not in it. Autoregression starts from BOS where the vocabulary has one, else from pad, as
    T5 does.

    Raises:
      UserError: the vocabulary has no EOS, or is of a kind whose ids nothing is known of.
    """
    import seqio

    from diffusion_t5x.data.llama2c_vocabulary import Llama2cVocabulary

    if vocabulary.eos_id is None:
        raise UserError(f"{type(vocabulary).__name__} has no EOS id: a target's end could not be written.")
    size = vocabulary.vocab_size
    start_id = vocabulary.pad_id
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        model, ids = vocabulary.tokenizer, list(range(size))
        special = np.array([model.IsControl(ids), model.IsUnknown(ids), model.IsUnused(ids)]).any(0)
        # T5's sentinels are added behind the pieces by SeqIO; later vocabularies have them in the model itself.
        sentinel = [re.fullmatch("▁?<extra_id_[0-9]+>", piece) is not None for piece in model.IdToPiece(ids)]
        text = ~(special | sentinel)
        contents = vocabulary.sp_model
        start_id = vocabulary.bos_id if vocabulary.bos_id >= 0 else start_id
    elif isinstance(vocabulary, seqio.ByteVocabulary):
        text = np.arange(size) < size - vocabulary.extra_ids
        text[vocabulary.unk_id] = False
        contents = f"bytes {size} {vocabulary.extra_ids}".encode()
    elif isinstance(vocabulary, Llama2cVocabulary):
        text = np.ones(size, bool)
        text[[vocabulary.unk_id, vocabulary.bos_id]] = False
        contents = vocabulary.contents
        start_id = vocabulary.bos_id
    elif isinstance(vocabulary, seqio.PassThroughVocabulary):
        text = np.ones(size, bool)
        contents = f"ids {size} {vocabulary.eos_id} {vocabulary.pad_id}".encode()
    else:
        raise UserError(
            f"{type(vocabulary).__name__} is not known here: use SeqIO's SentencePiece, Byte or PassThroughVocabulary, "
            "or Llama2cVocabulary."
        )
    text[[vocabulary.pad_id, vocabulary.eos_id]] = True
    edges = np.flatnonzero(np.diff(np.pad(text.astype(np.int8), 1))).tolist()
    return TokenIds(
        size=size + 1,
        pad_id=vocabulary.pad_id,
        eos_id=vocabulary.eos_id,
        mask_id=size,
        start_id=start_id,
        noise_ranges=tuple(zip(edges[::2], edges[1::2], strict=True)),
        name=type(vocabulary).__name__,
        fingerprint=hashlib.sha256(contents).hexdigest()[:16],
    )


def piece(vocabulary: "seqio.Vocabulary", token: int) -> bytes:
    """What one token of a SeqIO vocabulary stands for, in UTF-8; a byte may be only a part of a character.

    Ids that stand for no text have their SentencePiece names: "<unk>", "<extra_id_0>".
    """
    import seqio

    from diffusion_t5x.data.llama2c_vocabulary import Llama2cVocabulary

    if isinstance(vocabulary, Llama2cVocabulary):
        return vocabulary.piece(token)
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        name = vocabulary.tokenizer.IdToPiece(token)
        return bytes.fromhex(name[3:5]) if vocabulary.tokenizer.IsByte(token) else name.replace("▁", " ").encode()
    if isinstance(vocabulary, seqio.PassThroughVocabulary):
        return f" {token}".encode()
    sentinel = vocabulary.vocab_size - 1 - token
    if sentinel < vocabulary.extra_ids:
        return f"<extra_id_{sentinel}>".encode()
    return b"<unk>" if token == vocabulary.unk_id else bytes([token - 3])  # pad, EOS and unknown come first
