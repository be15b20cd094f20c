"""Drafting and checking in one pass: the text of token-by-token decoding, several tokens at a time."""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.autoregressive import read_prompt
from diffusion_t5x.decoding.decoder import Decoded, Watch, start_trace, target_range
from diffusion_t5x.decoding.rows import Carry, RowDecoder, cut, end_rows, show_rows, start_row
from diffusion_t5x.decoding.self_speculation import accepted, with_room
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.attention import write_rows
from diffusion_t5x.models.masks import CAUSAL, AttentionKind, Slots
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.readout import cross_entropy
from diffusion_t5x.models.sampling import Sampling, forbid, likeliest, sample
from diffusion_t5x.models.streams import row_keys
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import FloatBL, FloatBLV, IntB, IntBL, KeyB, KeyScalar


@dataclasses.dataclass(frozen=True)
class DraftingDecoder(RowDecoder):
    """Autoregressive decoding, several tokens per pass, for a model trained with `Drafts` or `JointDrafts`.

    Each pass reads the last pass's drafts from left to right and predicts the token after each: it accepts the drafts
    that equal what the model writes there, and one more token. The same pass makes new drafts, `block_size - 1` tokens
    after each place where the accepted text may end (TiDAR, arXiv 2511.08923); those after its actual end are kept. A
    pass reads `block_size ** 2` slots and writes between one and `block_size` tokens.

    The text is that of `AutoregressiveDecoder` with the same settings and key, at any temperature, whatever the drafts:
    the draw for a token depends only on its position, and a draft is kept if it equals the drawn token. So a draft d is
    accepted with the probability p(d) that the model gives it. Ties are the exception: a pass over several tokens
    rounds differently from a pass over one. The score is that decoder's score.

    Attributes:
      block_size: at most that of training.
      temperature, top_k, top_p: see `AutoregressiveDecoder`. Drafts are always the most likely tokens.
    """

    autoregressive: ClassVar[bool] = True
    left_to_right: ClassVar[bool] = True

    block_size: int = 4
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise UserError(f"DraftingDecoder.block_size must be at least 2; got {self.block_size}.")
        self.sampling  # noqa: B018  (raises on bad values now, not in the middle of a run)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def attention(self) -> AttentionKind:
        return AttentionKind("block_drafts", self.block_size)

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (Mode.of(self.attention, "mask"), Mode.of(CAUSAL))

    def start(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar | KeyB,
        trace: bool | Watch = False,
        piece: int | None = None,
    ) -> Carry:
        size, length = self.block_size, batch.tokens.shape[1]
        encoded = model.encode(batch)
        room = with_room(batch, 0, size**2)  # for the last pass
        first_target, num_targets = target_range(batch.target_mask)
        canvas, cache = read_prompt(model, room, CAUSAL, encoded, piece)
        nothing = jnp.zeros_like(first_target)
        history = start_trace(trace, canvas, length, length=length)
        return {
            **start_row(batch, row_keys(key, batch.example_ids), encoded, canvas, history),
            "first_target": first_target,
            "start": first_target,
            "end": first_target + num_targets,
            "drafts": jnp.full((len(canvas), size - 1), model.vocabulary.pad_id, jnp.int32),
            "num_ahead": nothing,
            "cache": cache,
            "num_drafted": nothing,
            "num_accepted": nothing,
        }

    def advance(self, model: Transformer, carry: Carry) -> Carry:
        """Writes what a pass accepts, and drafts on."""
        vocabulary, size, start = model.vocabulary, self.block_size, carry["start"]
        rows = jnp.arange(len(start))
        before = jnp.where(start == 0, vocabulary.start_id, carry["canvas"][rows, start - 1])
        masks = jnp.full((len(rows), size * (size - 1)), vocabulary.mask_id)
        read = jnp.concatenate([before[:, None], carry["drafts"], masks], axis=1)
        slots = carry["cache"].slots
        cache = carry["cache"].replace(slots=_with_drafts(slots, start, size))
        hidden, cache = model.extend(read, self.attention, cache, start, carry["encoded"])

        place = start[:, None] + jnp.arange(size)
        write = functools.partial(_write, vocabulary, self.sampling, carry["keys"])
        tokens, log_probability = model.map_logits(write, hidden[:, :size], place - carry["first_target"][:, None])
        ends = vocabulary.is_end(tokens) | (place == carry["end"][:, None] - 1)
        _, num_agreed, new = accepted(carry["drafts"], tokens, carry["num_ahead"], ends)
        new &= ~carry["finished"][:, None]
        num_new = jnp.sum(new, axis=-1, dtype=jnp.int32)

        of_last = size + num_agreed[:, None] * (size - 1) + jnp.arange(size - 1)
        ahead = jnp.take_along_axis(hidden, of_last[:, :, None], axis=1)
        drafts = model.map_logits(lambda logits: likeliest(forbid(logits, vocabulary)), ahead)

        def put(name, values):
            return write_rows(carry[name], jnp.where(new, values, cut(carry[name], start, size)), start)

        carry |= {
            "start": start + num_new,
            "canvas": put("canvas", tokens),
            "drafts": drafts.astype(jnp.int32),
            "num_ahead": jnp.full_like(start, size - 1),
            "cache": cache.replace(slots=slots),
            "finished": carry["finished"] | jnp.any(new & ends, axis=-1),
            "score": carry["score"] + jnp.sum(jnp.where(new, log_probability, 0), axis=-1),
            "row_steps": carry["row_steps"] + ~carry["finished"],
            "written_at": put("written_at", carry["row_steps"][:, None]),
            "num_drafted": carry["num_drafted"] + jnp.where(carry["finished"], 0, carry["num_ahead"]),
            "num_accepted": carry["num_accepted"] + jnp.minimum(num_agreed, num_new),
        }
        shown = cut(carry["canvas"], start, size)
        return show_rows(carry, start, shown, new, jnp.where(new, log_probability, -jnp.inf))

    def finish(self, vocabulary: TokenIds, carry: Carry) -> Decoded:
        return end_rows(carry, vocabulary)


def _with_drafts(slots: Slots, start: IntB, size: int) -> Slots:
    """Returns the slots of a pass: each row has `size` clean ones from its start on, and the drafts after each of them.

    Clean slots stay where they are. The drafts come after them, in slots that later passes overwrite, and have the
    positions of the tokens that they predict.
    """
    clean = np.repeat(np.arange(size), size - 1)
    ahead = np.tile(np.arange(1, size), size)
    at = start[:, None] + clean + ahead
    segment_ids, positions = (
        jnp.take_along_axis(jnp.asarray(x), at, axis=1) for x in (slots.segment_ids, slots.positions)
    )
    nowhere = jnp.full_like(slots.positions, -1)

    def behind(field, values):
        return write_rows(jnp.asarray(field), values, start + size)

    return slots.replace(
        segment_ids=behind(slots.segment_ids, segment_ids),
        positions=behind(slots.positions, positions),
        is_input=behind(slots.is_input, jnp.zeros_like(positions, bool)),
        seen=behind(nowhere, positions - ahead + 1),
    )


def _write(
    vocabulary: TokenIds, sampling: Sampling, keys: KeyB, logits: FloatBLV, place: IntBL
) -> tuple[IntBL, FloatBL]:
    """Returns the token at each position, as `AutoregressiveDecoder` draws it, and its log-probability."""
    logits = forbid(logits, vocabulary)
    tokens = sample(logits, keys, place, sampling)
    return tokens, -cross_entropy(logits, tokens)[1]
