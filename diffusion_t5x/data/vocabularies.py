"""Size and special ids of a vocabulary, for models, objectives and decoders."""

import codecs
import dataclasses
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from diffusion_t5x import terminal
from diffusion_t5x.data.vocabulary import AnyVocabulary, own
from diffusion_t5x.errors import UserError
from diffusion_t5x.shapes import Array, KeyScalar

SENTINELS = 100  # that vocabularies get after their own ids, as T5's have


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """The special ids of a vocabulary and the range that uniform noise is drawn from. Hashable, free of TensorFlow.

    Attributes:
      size: number of ids, including MASK. The embedding has at least this many rows.
      pad_id: padding; inside a target canvas it is a token like any other.
      eos_id: end of sequence.
      mask_id: the absorbing token of masked diffusion: an id of its own that no text encodes to.
      start_id: the id that an autoregressive model reads before the first token (pad in T5 vocabularies).
      noise_ranges: half-open, disjoint, ascending id ranges `((first, last + 1), ...)` of the noise vocabulary:
        everything that a target may contain (real pieces, pad, EOS) and nothing else (no sentinel, MASK, BOS, unknown,
        unused id).
      name: name of the vocabulary, for messages.
      fingerprint: hash of its contents; a checkpoint trained with another one is refused.
      noise_only: a model may write what is in the noise vocabulary, and nothing else.
      reads_start: see `ModelConfig.reads_start`, which `ModelDefinition` copies here.
      end_ids: other ids that end a text, such as the end of a turn in a chat (see `chats.Chat.end_ids`).
      resize_ids: ids of [expand] and [delete], with which a model changes the length of a hole (`objectives.resizing`):
        the last two sentinels. None: the vocabulary has no two.
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
    reads_start: bool = True
    end_ids: tuple[int, ...] = ()
    resize_ids: tuple[int, int] | None = None

    def for_infilling(self) -> Self:
        """Returns the ids as they apply in the holes of a text: a hole takes pieces of text, and nothing ends it.

        EOS and pad are MASK, which no decoder writes; the EOS and the pad after the text are given.
        """
        in_holes = np.zeros(self.size, bool)
        in_holes[self.noise_ids()] = True
        in_holes[[self.eos_id, self.pad_id]] = False
        return dataclasses.replace(
            self, pad_id=self.mask_id, eos_id=self.mask_id, noise_ranges=_ranges(in_holes), noise_only=True, end_ids=()
        )

    def with_resizing(self) -> Self:
        """Returns the ids for a decoder that resizes holes: [expand] and [delete] may be proposed.

        Raises:
          UserError: the vocabulary has no two sentinels.
        """
        may_write = np.zeros(self.size, bool)
        may_write[self.noise_ids()] = True
        may_write[list(self.resizing())] = True
        return dataclasses.replace(self, noise_ranges=_ranges(may_write))

    def resizing(self) -> tuple[int, int]:
        """Returns `resize_ids`. Raises a UserError if the vocabulary has no two sentinels."""
        if self.resize_ids is None:
            raise UserError(
                f"The vocabulary {self.name} has no sentinels for [expand] and [delete], which holes of unknown length "
                "need: take one with at least two extra_ids."
            )
        return self.resize_ids

    def is_end(self, tokens: Int[Array, "*shape"]) -> Bool[jax.Array, "*shape"]:
        """Returns True for tokens that end a text: EOS, pad and `end_ids`."""
        is_end = (tokens == self.eos_id) | (tokens == self.pad_id)
        return functools.reduce(lambda found, end: found | (tokens == end), self.end_ids, is_end)

    def noise_ids(self) -> np.ndarray:
        """Returns int32 `[number of noise ids]`: the noise vocabulary in ascending order."""
        return np.concatenate([np.arange(first, end, dtype=np.int32) for first, end in self.noise_ranges])

    def sample_noise(self, key: KeyScalar, shape: tuple[int, ...]) -> Int[jax.Array, "..."]:
        """Draws ids of this shape uniformly from the noise vocabulary."""
        ids = self.noise_ids()
        return jnp.asarray(ids, jnp.int32)[jax.random.randint(key, shape, 0, len(ids), jnp.int32)]

    def describe(self) -> dict[str, str | int]:
        """Returns the vocabulary's entry in a checkpoint's metadata."""
        return {"name": self.name, "size": self.size, "mask_id": self.mask_id, "fingerprint": self.fingerprint}

    def check_same(self, described: Mapping[str, str | int], path: str) -> None:
        """Checks that the checkpoint at `path`, with `described` in its metadata, was trained with this vocabulary.

        The name is a class's: the same contents under another class are the same vocabulary.

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
    """Returns the half-open ranges of chosen ids, bool `[size]`."""
    edges = np.flatnonzero(np.diff(np.pad(chosen.astype(np.int8), 1))).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _sentence(described: Mapping[str, str | int]) -> str:
    return ", ".join(f"{key} {value}" for key, value in described.items())


def difference(one: AnyVocabulary, other: AnyVocabulary) -> str:
    """Describes the difference between two vocabularies."""
    kinds = [type(vocabulary).__name__ for vocabulary in (one, other)]
    if kinds[0] != kinds[1]:
        return f"one is a {kinds[0]}, the other a {kinds[1]}"
    files = [own(vocabulary).file for vocabulary in (one, other)]
    if files[0] != files[1]:
        return f"one is {files[0]}, the other {files[1]}"
    if one.extra_ids != other.extra_ids:
        return f"they differ only in extra_ids, {one.extra_ids} and {other.extra_ids}"
    return f"both are a {kinds[0]}, but with other pieces"


def token_ids(vocabulary: AnyVocabulary) -> TokenIds:
    """Returns the special ids of a vocabulary, for diffusion; see `mask_id_of` for MASK.

    The noise vocabulary is everything that a target may contain: pieces (byte-fallback pieces too), pad and EOS.
    Sentinels, unknown, control and unused ids are not in it. Autoregressive models start from BOS if the vocabulary has
    one, otherwise from pad, as T5 does.

    Raises:
      UserError: the vocabulary has no EOS, or its kind is unknown.
    """
    known = own(vocabulary)
    text = known.is_text()
    sentinels = list(known.sentinel_ids())
    text[sentinels] = False
    text[[known.pad_id, known.eos_id]] = True
    mask_id = mask_id_of(known)
    text[mask_id : mask_id + 1] = False
    return TokenIds(
        size=max(known.vocab_size, mask_id + 1),
        pad_id=known.pad_id,
        eos_id=known.eos_id,
        mask_id=mask_id,
        start_id=known.pad_id if known.bos_id is None else known.bos_id,
        noise_ranges=_ranges(text),
        name=type(vocabulary).__name__,
        fingerprint=hashlib.sha256(known.contents).hexdigest()[:16],
        resize_ids=(sentinels[-2], sentinels[-1]) if len(sentinels) > 1 else None,
    )


def mask_id_of(vocabulary: AnyVocabulary) -> int:
    """Returns the id of MASK: the one that the vocabulary names, or else the first after its own."""
    named = getattr(vocabulary, "mask_id", None)
    return vocabulary.vocab_size if named is None else named


def source_of(vocabulary: AnyVocabulary) -> dict[str, str | int | None] | None:
    """Returns the arguments of `vocabulary_files.vocabulary` that make this vocabulary; None if there are none."""
    found = own(vocabulary).source()
    if found and found["file"] and "://" not in found["file"]:
        found["file"] = os.path.abspath(os.path.expanduser(found["file"]))
    return found


def sentinels(vocabulary: AnyVocabulary) -> range:
    """Returns the ids of T5's sentinels `<extra_id_0>`, `<extra_id_1>` ..., descending; empty if there are none.

    They are SeqIO's or the model's own: the last pieces of a SentencePiece model, or by name in a tokenizer.json.

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


def piece(vocabulary: AnyVocabulary, token: int) -> bytes:
    """Returns the UTF-8 bytes of one token; a byte may be only part of a character.

    Ids that represent no text have their SentencePiece names: "<unk>", "<extra_id_0>".
    """
    return own(vocabulary).piece(token)


def encode_part(vocabulary: AnyVocabulary, text: str, begins: bool) -> list[int]:
    """Encodes a part of a text; the tokens of all parts together read as the text.

    SentencePiece puts a space before a whole text that has none, and drops spaces at its ends. A part gets a space only
    if it `begins` the text, and keeps its own.

    Raises:
      UserError: the vocabulary has no texts, or no piece for a character.
    """
    return own(vocabulary).encode_part(text, begins)


def cells(vocabulary: AnyVocabulary, tokens: Sequence[int], signs: Mapping[int, str]) -> list[str]:
    """Returns the texts of a text's tokens, one each; joined they are the text.

    A character of several tokens (bytes) is at the last of them; invalid UTF-8 is "�".

    Args:
      vocabulary: the vocabulary of the tokens.
      tokens: the tokens, from the beginning of a text.
      signs: texts to show for some tokens.
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


def signs(vocabulary: AnyVocabulary) -> dict[int, str]:
    """Symbols for tokens that are not text: EOS as ¶, pad as ·, MASK as ▢."""
    return {vocabulary.eos_id: "¶", vocabulary.pad_id: "·", mask_id_of(vocabulary): "▢"}


def to_text(vocabulary: AnyVocabulary, tokens: Iterable[int], end_ids: Collection[int] = ()) -> str:
    """Returns the text of target tokens, up to EOS, the first pad or the first of `end_ids`."""
    ends = {vocabulary.eos_id, vocabulary.pad_id, *end_ids}
    text = vocabulary.decode(list(itertools.takewhile(lambda token: token not in ends, tokens)))
    return text if isinstance(text, str) else " ".join(map(str, text))  # a PassThroughVocabulary has no texts


def visible(text: bytes) -> str:
    """Returns UTF-8 text with symbols or angle brackets for control characters, so that it is safe in a terminal."""
    return terminal.signs(text.decode("utf-8", "surrogateescape"))
