"""Self-speculation: one model drafts a block by diffusion and checks the draft autoregressively in one pass.

Speculative decoding (arXiv 2211.17192, section 2), greedy, with the model as its own draft model.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.autoregressive import read_prompt
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.canvas import Canvas, denoise
from diffusion_t5x.decoding.decoder import Decoded, Watch, into_block, start_trace, target_range
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.rows import Carry, RowDecoder, cut, end_rows, read_inputs, show_rows, start_row
from diffusion_t5x.models.attention import KVCache, write_rows
from diffusion_t5x.models.masks import Slots
from diffusion_t5x.models.modes import LeftToRight, Mode
from diffusion_t5x.models.reading import Reading, check_blocks, start_first
from diffusion_t5x.models.readout import cross_entropy
from diffusion_t5x.models.sampling import forbid, likeliest
from diffusion_t5x.models.stack import Encoded
from diffusion_t5x.models.streams import row_keys
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import FloatBL, FloatBLV, IntB, IntBL, KeyB, KeyScalar


@dataclasses.dataclass(frozen=True)
class SelfSpeculationDecoder(LeftToRight, RowDecoder):
    """Greedy autoregressive decoding, several tokens at a time, for a model that was trained for both modes.

    Each round drafts the rest of a block and reads the draft in one autoregressive pass. It accepts the longest prefix
    of the draft that the model would have written token by token, plus one token that the pass itself predicts. So the
    output is that of `AutoregressiveDecoder` at temperature 0, whatever the drafts, except for ties: a pass over
    several tokens rounds differently from a pass over one. The score is that decoder's too, the log-probability of the
    output up to and including EOS: higher is better.

    A round costs the draft's steps plus one pass, and writes at least one token and at most one more than it drafts.
    Two caches of keys and values are kept. The autoregressive mode's, in which each slot reads the previous token, is
    exact for accepted tokens. So is the drafts', in which each slot reads its own token and sees its block both ways: a
    draft's first pass also reads the previous block, finished by then, which saves a pass.

    Attributes:
      draft: writes the drafts, with the block size that the model was trained with. With one step per block, a round
        takes two passes.
      prefix: the model was trained with bidirectional attention over the inputs, in its autoregressive mode.
    """

    left_to_right: ClassVar[bool] = True

    draft: BlockDecoder = BlockDecoder(4, MaskedDecoder(num_steps=1))  # noqa: RUF009  (frozen)
    prefix: bool = False

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (*self.draft.modes, Mode.of(self.attention)) if self.draft.modes else ()

    def start(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar | KeyB,
        trace: bool | Watch = False,
        piece: int | None = None,
    ) -> Carry:
        check_blocks(self.draft.attention, model.config.shifted)
        size, inner, length = self.draft.block_size, self.draft.inner, batch.tokens.shape[1]
        keys = row_keys(key, batch.example_ids)
        encoded = model.encode(batch)
        room = with_room(batch, size, size + 1)
        first_target, num_targets = target_range(room.target_mask)
        # No slot of the targets is seen before it is written anew, in either cache.
        canvas = inner.blank(room, model.vocabulary, keys)
        _, cache = read_prompt(model, room, self.attention, encoded, piece)
        canvas, draft_cache = self._read_for_drafts(model, room, canvas, encoded, piece)
        history = start_trace(trace, canvas, length * (inner.most_steps(size) + 1), size, length)
        nothing = jnp.zeros_like(first_target)
        return {
            **start_row(batch, keys, encoded, canvas, history),
            "room": room,
            "first_block": first_target - into_block(self.draft.attention, room.positions, first_target),
            "start": first_target,
            "end": first_target + num_targets,
            "cache": cache,
            "draft_cache": draft_cache,
            "num_drafted": nothing,
            "num_accepted": nothing,
        }

    def advance(self, model: Transformer, carry: Carry) -> Carry:
        """Writes what a round accepts; see the class."""
        vocabulary, size, room = model.vocabulary, self.draft.block_size, carry["room"]
        start, row_numbers = carry["start"], jnp.arange(len(room.tokens))
        block = start - (start - carry["first_block"]) % size
        carry, tokens, num_drafted = self._write_draft(model, carry, block)
        draft = cut(write_rows(carry["canvas"], tokens, block), start, size)

        # One autoregressive pass: slot by slot the token before it, and what is to be written there.
        before = carry["canvas"][row_numbers, start - 1]
        before = jnp.where(room.positions[row_numbers, start] == 0, vocabulary.start_id, before)
        read = jnp.concatenate([before[:, None], draft], axis=1)
        hidden, cache = model.extend(read, self.attention, carry["cache"], start, carry["encoded"])
        tokens, log_probability = model.map_logits(functools.partial(_most_likely, vocabulary), hidden)

        ends = vocabulary.is_end(tokens) | (start[:, None] + jnp.arange(size + 1) == carry["end"][:, None] - 1)
        is_drafted, num_agreed, new = accepted(draft, tokens, num_drafted, ends)
        new &= ~carry["finished"][:, None]
        num_new = jnp.sum(new, axis=-1, dtype=jnp.int32)

        def put(name, values):
            return write_rows(carry[name], jnp.where(new, values, cut(carry[name], start, size + 1)), start)

        carry |= {
            "start": start + num_new,
            "canvas": put("canvas", tokens),
            "cache": cache,
            "finished": carry["finished"] | jnp.any(new & ends, axis=-1),
            "score": carry["score"] + jnp.sum(jnp.where(new, log_probability, 0), axis=-1),
            "row_steps": carry["row_steps"] + ~carry["finished"],
            "written_at": put("written_at", carry["row_steps"][:, None]),
            "num_drafted": carry["num_drafted"] + num_drafted,
            "num_accepted": carry["num_accepted"] + jnp.minimum(num_agreed, num_new),
        }
        shown = cut(carry["canvas"], start, size + 1)
        return show_rows(carry, start, shown, new | is_drafted, jnp.where(new, log_probability, -jnp.inf))

    def finish(self, vocabulary: TokenIds, carry: Carry) -> Decoded:
        """`written_at` counts a row's own steps; the trace shows drafts, and that what was not accepted is gone."""
        unwritten = carry["room"].target_mask & (carry["written_at"] < 0)
        canvas = jnp.where(unwritten, vocabulary.pad_id, carry["canvas"])
        return end_rows(carry | {"canvas": canvas}, vocabulary, first=self.draft.block_size)

    def _read_for_drafts(
        self, model: Transformer, room: Batch, canvas: IntBL, encoded: Encoded | None, piece: int | None
    ) -> tuple[IntBL, KVCache]:
        """Returns the canvas as drafts read it, and their cache with the inputs."""
        vocabulary, shifted = model.vocabulary, model.config.shifted
        reading = Reading.of(room, vocabulary, shifted)
        cache = KVCache.empty(model.config, Slots.of(reading.batch))
        has_start = shifted and vocabulary.reads_start
        read = reading.tokens(canvas, vocabulary) if has_start else canvas
        if has_start:  # drafts read the start token first
            canvas = canvas.at[:, self.draft.block_size - 1].set(vocabulary.start_id)
        end = target_range(room.target_mask)[0] + has_start
        return canvas, read_inputs(model, read, self.draft.attention, cache, end, encoded, piece)[1]

    def _write_draft(
        self, model: Transformer, carry: Carry, block: IntB
    ) -> tuple[Carry, Int[jax.Array, "batch size"], IntB]:
        """Drafts the rest of each row's block from `block` on: its tokens, and the number of new ones."""
        vocabulary, shifted, room = model.vocabulary, model.config.shifted, carry["room"]
        # A shifted model predicts each token in the slot before its own.
        size, ahead = self.draft.block_size, 1 if shifted else 0
        offset = ahead if vocabulary.reads_start else 0  # the start token takes a slot
        unfinished = ~carry["finished"][:, None]
        new = cut(room.target_mask, block, size) & (block[:, None] + jnp.arange(size) >= carry["start"][:, None])
        new &= unfinished
        before, positions = cut(carry["canvas"], block - size, size), cut(room.positions, block - size, 2 * size)

        def read(tokens, carry):
            tokens = jnp.concatenate([before, tokens], axis=1)
            if not shifted:
                tokens = start_first(tokens, positions, vocabulary)
            hidden, draft_cache = model.extend(
                tokens, self.draft.attention, carry["draft_cache"], block - size + offset, carry["encoded"]
            )
            states = hidden[:, size - ahead : 2 * size - ahead]
            if offset < ahead:  # a row's first token is predicted in its own slot
                states = jnp.where(positions[:, size:, None] == 0, hidden[:, size:], states)
            return states, carry | {"draft_cache": draft_cache}

        def show_draft(carry, written):
            return show_rows(carry, block, written.tokens, written.mask, written.log_probability)

        draft = Canvas.start(cut(carry["canvas"], block, size), new)
        draft, carry = denoise(
            self.draft.inner, model, draft, positions[:, size:], carry["keys"], read, show_draft, carry
        )
        carry |= {"row_steps": carry["row_steps"] + draft.row_steps}
        return carry, draft.tokens, jnp.sum(new, axis=-1, dtype=jnp.int32)


def with_room(batch: Batch, before: int, after: int) -> Batch:
    """Pads rows with that many slots before and after them: slots that do not exist, and that nothing sees."""
    names = ("tokens", "target_mask", "segment_ids", "positions")
    return batch.replace(**{name: jnp.pad(getattr(batch, name), ((0, 0), (before, after))) for name in names})


def accepted(
    draft: Int[jax.Array, "batch size"],
    tokens: Int[jax.Array, "batch size+1"],
    num_drafted: IntB,
    ends: Bool[jax.Array, "batch size+1"],
) -> tuple[Bool[jax.Array, "batch size+1"], IntB, Bool[jax.Array, "batch size+1"]]:
    """Returns the accepted part of a draft and one more token, up to the first that ends the row.

    Args:
      draft: the drafted tokens.
      tokens: the model's own tokens there, and one more.
      num_drafted: number of tokens that were drafted now.
      ends: True for tokens that end the row.

    Returns:
      Masks of the drafted places and of the new tokens, and between them the number of drafted tokens that agree.
    """
    size = draft.shape[1]
    place = jnp.arange(size + 1)
    is_drafted = place < num_drafted[:, None]
    agrees = is_drafted[:, :size] & (draft == tokens[:, :size])
    num_agreed = jnp.sum(jnp.cumprod(agrees, axis=-1), axis=-1, dtype=jnp.int32)
    return is_drafted, num_agreed, (place <= num_agreed[:, None]) & (jnp.cumsum(ends, axis=-1) - ends == 0)


def _most_likely(vocabulary: TokenIds, logits: FloatBLV) -> tuple[IntBL, FloatBL]:
    """Returns the most likely token of each slot, and its log-probability."""
    logits = forbid(logits, vocabulary)
    tokens = likeliest(logits)
    return tokens, -cross_entropy(logits, tokens)[1]
