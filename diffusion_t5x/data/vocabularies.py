"""The size and special ids of a vocabulary, for models, objectives and decoders."""

import codecs
import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Self

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_t5x import terminal
from diffusion_t5x.data.batch import Array
from diffusion_t5x.data.vocabulary import own
from diffusion_t5x.errors import UserError

if TYPE_CHECKING:
    from diffusion_t5x.data.vocabulary import AnyVocabulary

SENTINELS = 100  # that vocabularies get after their own ids, as T5's have


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
      name: name of the vocabulary, for messages.
      fingerprint: hash of its contents; a checkpoint trained with another one is refused.
      noise_only: a model may write what is in the noise vocabulary, and nothing else.
    """

    size: int
    pad_id: int
    eos_id: int
    mask_id: int
    start_id: int
    noise_ranges: tuple[tuple[int, int], ...]
    name: str = ""
    fingerprint: str = ""
    noise_only: bool = False

    def for_infilling(self) -> Self:
        """The same ids as they are in the holes of a text: pieces of text may be written, and nothing ends it.

        End and padding are MASK, which no decoder writes; the EOS and the pad behind the text are given.
        """
        in_holes = np.zeros(self.size, bool)
        in_holes[self.noise_ids()] = True
        in_holes[[self.eos_id, self.pad_id]] = False
        return dataclasses.replace(
            self, pad_id=self.mask_id, eos_id=self.mask_id, noise_ranges=_ranges(in_holes), noise_only=True
        )

    def is_end(self, tokens: Array) -> jax.Array:
        """True for tokens that are EOS or pad, either of which ends a text."""
        return (tokens == self.eos_id) | (tokens == self.pad_id)

    def noise_ids(self) -> np.ndarray:
        """int32 `[number of noise ids]`: the noise vocabulary in ascending order."""
        return np.concatenate([np.arange(first, end, dtype=np.int32) for first, end in self.noise_ranges])

    def sample_noise(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Ids drawn uniformly from the noise vocabulary, int32 `[*shape]`."""
        ids = self.noise_ids()
        return jnp.asarray(ids, jnp.int32)[jax.random.randint(key, shape, 0, len(ids), jnp.int32)]

    def describe(self) -> dict[str, str | int]:
        """The vocabulary's entry in a checkpoint's metadata."""
        return {"name": self.name, "size": self.size, "mask_id": self.mask_id, "fingerprint": self.fingerprint}

    def check_same(self, described: Mapping[str, str | int], path: str) -> None:
        """Checks that the checkpoint at `path`, whose metadata hold `described`, was trained with this vocabulary.

        The name is that of a class: the same contents under another class are the same vocabulary.

        Raises:
          UserError: another vocabulary.
        """
        here = self.describe()
        # The name is for people: a class of its own that reads the same file is the same vocabulary.
        if any(described.get(field) != value for field, value in here.items() if field != "name"):
            more = self.size - int(described.get("size", self.size))
            hint = ""
            if more and described.get("name") == self.name:
                count = f"{abs(more)} ids {'more' if more > 0 else 'fewer'}"
                hint = f" The task's has {count}: if both come from one file, they differ in extra_ids alone."
            raise UserError(
                f"{path} was trained with another vocabulary ({_sentence(described)}) than the task's "
                f"({_sentence(self.describe())}): choose a task with the checkpoint's vocabulary or another checkpoint."
                f"{hint}"
            )


def _ranges(chosen: np.ndarray) -> tuple[tuple[int, int], ...]:
    """The half-open ranges of the ids that are chosen, bool `[size]`."""
    edges = np.flatnonzero(np.diff(np.pad(chosen.astype(np.int8), 1))).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _sentence(described: Mapping[str, str | int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in described.items())


def difference(one: "AnyVocabulary", other: "AnyVocabulary") -> str:
    """The difference between two vocabularies, in words."""
    kinds = [type(vocabulary).__name__ for vocabulary in (one, other)]
    if kinds[0] != kinds[1]:
        return f"one is a {kinds[0]}, the other a {kinds[1]}"
    files = [own(vocabulary).file for vocabulary in (one, other)]
    if files[0] != files[1]:
        return f"one is {files[0]}, the other {files[1]}"
    if one.extra_ids != other.extra_ids:
        return f"they differ only in extra_ids, {one.extra_ids} and {other.extra_ids}"
    return f"both are a {kinds[0]}, but with other pieces"


def token_ids(vocabulary: "AnyVocabulary") -> TokenIds:
    """The special ids of a vocabulary, for diffusion. MASK gets the first id after the vocabulary's own.

    The noise vocabulary is what a target may hold: pieces (byte-fallback pieces too), pad and EOS. Sentinels, unknown,
    control and unused ids are not in it. Autoregression starts from BOS where the vocabulary has one, else from pad, as
    T5 does.

    Raises:
      UserError: the vocabulary has no EOS, or is of a kind whose ids nothing is known of.
    """
    known = own(vocabulary)
    text = known.is_text()
    text[list(known.sentinel_ids())] = False
    text[[known.pad_id, known.eos_id]] = True
    return TokenIds(
        size=known.vocab_size + 1,
        pad_id=known.pad_id,
        eos_id=known.eos_id,
        mask_id=known.vocab_size,
        start_id=known.pad_id if known.bos_id is None else known.bos_id,
        noise_ranges=_ranges(text),
        name=type(vocabulary).__name__,
        fingerprint=hashlib.sha256(known.contents).hexdigest()[:16],
    )


def source_of(vocabulary: "AnyVocabulary") -> dict[str, str | int | None] | None:
    """The arguments by which `vocabulary_files.vocabulary` makes this vocabulary again; None if it cannot."""
    found = own(vocabulary).source()
    if found and found["file"] and "://" not in found["file"]:
        found["file"] = os.path.abspath(os.path.expanduser(found["file"]))
    return found


def sentinels(vocabulary: "AnyVocabulary") -> range:
    """The ids of T5's sentinels `<extra_id_0>`, `<extra_id_1>` ..., each one below the other; empty where it has none.

    They are SeqIO's or the model's own: a SentencePiece model's last pieces, and those of a tokenizer.json by name.

    Raises:
      UserError: a tokenizer.json has sentinels whose ids do not descend.
    """
    ids = list(own(vocabulary).sentinel_ids())
    descending = range(ids[0], ids[0] - len(ids), -1) if ids else range(0)
    if ids != list(descending):
        raise UserError(
            f"The tokenizer has <extra_id_0> to <extra_id_{len(ids) - 1}> with the ids {str(ids[:3])[1:-1]}, ...: "
            "T5's sentinels have descending ids, one below the other."
        )
    return descending


def piece(vocabulary: "AnyVocabulary", token: int) -> bytes:
    """The UTF-8 bytes of one token; a byte may be only part of a character.

    Ids that stand for no text have their SentencePiece names: "<unk>", "<extra_id_0>".
    """
    return own(vocabulary).piece(token)


def encode_part(vocabulary: "AnyVocabulary", text: str, begins: bool) -> list[int]:
    """The tokens of a part of a text, whose other parts are encoded by themselves: together they read as the text.

    A whole text that begins without a space gets one from SentencePiece, and loses spaces at its ends. A part gets the
    space only where it `begins` the text, and keeps its own.

    Raises:
      UserError: a vocabulary without texts, or that has no piece for a character.
    """
    return own(vocabulary).encode_part(text, begins)


def cells(vocabulary: "AnyVocabulary", tokens: Sequence[int], signs: Mapping[int, str]) -> list[str]:
    """The texts of a text's tokens one by one; joined they are the text.

    A character of several tokens (bytes) stands at the last of them; what is no UTF-8 is "�".

    Args:
      vocabulary: what they are tokens of.
      tokens: from the beginning of a text.
      signs: what to show in place of some tokens.
    """
    known = own(vocabulary)
    pieces = {token: signs[token].encode() if token in signs else known.piece(token) for token in set(tokens)}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts: list[str] = []
    for token in tokens:
        if texts and not re.match(rb"[\x80-\xbf]", pieces[token]):  # a new character: the last one ends as it is
            texts[-1] += decoder.decode(b"", final=True)
        texts.append(decoder.decode(pieces[token]))
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return [texts[0].removeprefix(" "), *texts[1:]] if texts and known.puts_space else texts


def signs(vocabulary: "AnyVocabulary") -> dict[int, str]:
    """Symbols for tokens that are not text: EOS as ¶, pad as ·, MASK as ▢."""
    return {vocabulary.eos_id: "¶", vocabulary.pad_id: "·", vocabulary.vocab_size: "▢"}


def to_text(vocabulary: "AnyVocabulary", tokens: Iterable[int]) -> str:
    """The text of target tokens, up to EOS or the first pad."""
    ends = (vocabulary.eos_id, vocabulary.pad_id)
    text = vocabulary.decode(list(itertools.takewhile(lambda token: token not in ends, tokens)))
    return text if isinstance(text, str) else " ".join(map(str, text))  # a PassThroughVocabulary has no texts


def visible(text: bytes) -> str:
    """UTF-8 text with symbols or angle brackets in place of control characters, so that a terminal is safe."""
    return terminal.signs(text.decode("utf-8", "surrogateescape"))
