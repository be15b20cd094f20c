"""Self-speculation: one model drafts a block by diffusion and checks the draft autoregressively in one pass.

Speculative decoding (arXiv 2211.17192, section 2), greedy, with the model as its own draft model.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int, Shaped

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.autoregressive import read_prompt
from diffusion_t5x.decoding.block import BlockDecoder, Carry, end_rows, show_rows, start_row
from diffusion_t5x.decoding.canvas import Canvas, denoise
from diffusion_t5x.decoding.decoder import Decoded, Decoder, Watch, into_block, start_trace, target_range
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.models.attention import KVCache, write_rows
from diffusion_t5x.models.masks import Slots
from diffusion_t5x.models.modes import LeftToRight, Mode
from diffusion_t5x.models.reading import Reading, check_blocks, start_first
from diffusion_t5x.models.readout import cross_entropy
from diffusion_t5x.models.sampling import forbid, likeliest
from diffusion_t5x.models.stack import Encoded
from diffusion_t5x.models.streams import row_keys
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import Array, FloatBL, FloatBLV, IntB, IntBL, KeyB, KeyScalar


@dataclasses.dataclass(frozen=True)
class SelfSpeculationDecoder(LeftToRight, Decoder):
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

    def decode(self, model: Transformer, batch: Batch, key: KeyScalar, trace: bool | Watch = False) -> Decoded:
        """`written_at` counts a row's own steps; the trace shows drafts, and that what was not accepted is gone."""
        check_blocks(self.draft.attention, model.config.shifted)
        vocabulary, size, inner = model.vocabulary, self.draft.block_size, self.draft.inner
        keys = row_keys(key, batch.example_ids)
        encoded = model.encode(batch)
        room = with_room(batch, size, size + 1)
        length, row_numbers = batch.tokens.shape[1], jnp.arange(len(batch.tokens))
        first_target, num_targets = target_range(batch.target_mask)
        tail = into_block(self.draft.attention, batch.positions, first_target)
        first_target, end = first_target + size, first_target + size + num_targets

        # Each mode reads the inputs in one pass. No slot of the targets is seen before it is written anew.
        canvas = inner.blank(room, vocabulary, keys)
        _, cache = read_prompt(model, room, self.attention, encoded)
        canvas, draft_cache = self._read_for_drafts(model, room, canvas, encoded)

        def write_some(carry):
            start = carry["start"]
            block = start - (start - first_target + tail) % size
            carry, tokens, num_drafted = self._write_draft(model, room, encoded, keys, carry, block)
            draft = cut(write_rows(carry["canvas"], tokens, block), start, size)

            # One autoregressive pass: slot by slot the token before it, and what is to be written there.
            before = carry["canvas"][row_numbers, start - 1]
            before = jnp.where(room.positions[row_numbers, start] == 0, vocabulary.start_id, before)
            read = jnp.concatenate([before[:, None], draft], axis=1)
            hidden, cache = model.extend(read, self.attention, carry["cache"], start, encoded)
            tokens, log_probability = model.map_logits(functools.partial(_most_likely, vocabulary), hidden)

            ends = vocabulary.is_end(tokens) | (start[:, None] + jnp.arange(size + 1) == end[:, None] - 1)
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

        nothing = jnp.zeros_like(first_target)
        history = start_trace(trace, canvas, length * (inner.most_steps(size) + 1), size, length)
        carry = {
            **start_row(canvas, num_targets == 0, history),
            "start": first_target,
            "cache": cache,
            "draft_cache": draft_cache,
            "num_drafted": nothing,
            "num_accepted": nothing,
        }
        carry = jax.lax.while_loop(lambda carry: ~jnp.all(carry["finished"]), write_some, carry)
        unwritten = room.target_mask & (carry["written_at"] < 0)
        carry["canvas"] = jnp.where(unwritten, vocabulary.pad_id, carry["canvas"])
        return end_rows(carry, batch, vocabulary, first=size)

    def _read_for_drafts(
        self, model: Transformer, room: Batch, canvas: IntBL, encoded: Encoded | None
    ) -> tuple[IntBL, KVCache]:
        """Returns the drafts' cache after a pass over the inputs, and the canvas as they read it."""
        vocabulary, shifted = model.vocabulary, model.config.shifted
        reading = Reading.of(room, vocabulary, shifted)
        cache = KVCache.empty(model.config, Slots.of(reading.batch))
        has_start = shifted and vocabulary.reads_start
        read = reading.tokens(canvas, vocabulary) if has_start else canvas
        if has_start:  # drafts read the start token first
            canvas = canvas.at[:, self.draft.block_size - 1].set(vocabulary.start_id)
        start = jnp.zeros(len(canvas), jnp.int32)
        return canvas, model.extend(read, self.draft.attention, cache, start, encoded)[1]

    def _write_draft(
        self, model: Transformer, room: Batch, encoded: Encoded | None, keys: KeyB, carry: Carry, block: IntB
    ) -> tuple[Carry, Int[jax.Array, "batch size"], IntB]:
        """Drafts the rest of each row's block from `block` on: its tokens, and the number of new ones."""
        vocabulary, shifted = model.vocabulary, model.config.shifted
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
                tokens, self.draft.attention, carry["draft_cache"], block - size + offset, encoded
            )
            states = hidden[:, size - ahead : 2 * size - ahead]
            if offset < ahead:  # a row's first token is predicted in its own slot
                states = jnp.where(positions[:, size:, None] == 0, hidden[:, size:], states)
            return states, carry | {"draft_cache": draft_cache}

        def show_draft(carry, written):
            return show_rows(carry, block, written.tokens, written.mask, written.log_probability)

        draft = Canvas.start(cut(carry["canvas"], block, size), new)
        draft, carry = denoise(self.draft.inner, model, draft, positions[:, size:], keys, read, show_draft, carry)
        carry |= {"row_steps": carry["row_steps"] + draft.row_steps}
        return carry, draft.tokens, jnp.sum(new, axis=-1, dtype=jnp.int32)


def with_room(batch: Batch, before: int, after: int) -> Batch:
    """Pads rows with that many slots before and after them: slots that do not exist, and that nothing sees."""
    names = ("tokens", "target_mask", "segment_ids", "positions")
    return batch.replace(**{name: jnp.pad(getattr(batch, name), ((0, 0), (before, after))) for name in names})


def cut(x: Shaped[Array, "batch length"], start: IntB, size: int) -> Shaped[jax.Array, "batch {size}"]:
    """Returns `size` slots of each row from its start on."""
    return jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, size))(x, start)


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
