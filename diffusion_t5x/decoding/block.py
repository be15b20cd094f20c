"""Block decoding: diffusion inside a block, over an exact cache of earlier blocks (arXiv 2503.09573, section 3.2)."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.allowed_texts import Span
from diffusion_t5x.decoding.canvas import Canvas, StepRule, Written, denoise
from diffusion_t5x.decoding.decoder import (
    Decoded,
    Decoder,
    Trace,
    Watch,
    Watched,
    into_block,
    start_trace,
    target_range,
)
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.attention import KVCache, write_rows
from diffusion_t5x.models.masks import AttentionKind, BlocksFrom, Slots
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.reading import Reading, check_blocks, start_first
from diffusion_t5x.models.streams import row_keys
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import BoolB, BoolBL, FloatBL, IntB, IntBL, KeyScalar

Carry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class BlockDecoder(Decoder):
    """Writes targets block by block. Earlier blocks and the inputs never change and are computed once.

    A row stops after the block in which it has written EOS or pad; everything after that is dropped. The score is the
    inner decoder's score, averaged over the written targets. Every block costs one pass more than it has steps: the
    pass over its finished tokens, for the cache.

    A shifted model (`ModelConfig.shifted`) predicts the first token of a block in the slot of the finished token before
    the block: see `objectives.block.Block`.

    Attributes:
      block_size: targets per block, as in training.
      inner: how a block is written; its `num_steps` are those of a block. Masked for models of masked blocks, SUNDAE's
        with one sample for those of uniform noise.
      blocks_from: where blocks are counted from, as in training: see `AttentionKind`. From the row's beginning, the
        first block may begin with the last inputs, which stay.
    """

    block_size: int = 4
    inner: StepRule = MaskedDecoder(num_steps=4)  # noqa: RUF009  (frozen)
    blocks_from: BlocksFrom = "targets"

    def __post_init__(self) -> None:
        AttentionKind("block_causal", self.block_size, self.blocks_from)  # raises on bad blocks
        if self.inner.num_samples != 1:
            raise UserError(f"BlockDecoder.inner must have num_samples = 1: a block is written once; got {self.inner}.")
        if self.inner.guidance:
            raise UserError(f"BlockDecoder.inner must have guidance = 0: its inputs are read once; got {self.inner}.")

    def within(self, language: Language) -> Self:
        return dataclasses.replace(self, inner=self.inner.within(language))

    @property
    def attention(self) -> AttentionKind:
        return AttentionKind("block_causal", self.block_size, self.blocks_from)

    @property
    def modes(self) -> tuple[Mode, ...]:
        return tuple(Mode.of(self.attention, mode.noise) for mode in self.inner.modes)

    def decode(self, model: Transformer, batch: Batch, key: KeyScalar, trace: bool | Watch = False) -> Decoded:
        vocabulary, shifted = model.vocabulary, model.config.shifted
        size, inner = self.block_size, self.inner
        keys = row_keys(key, batch.example_ids)
        check_blocks(self.attention, shifted)
        encoded = model.encode(batch)
        reading = Reading.of(batch, vocabulary, shifted)
        blank = inner.blank(batch, vocabulary, keys)
        # Room for the last block of any row, beyond its end: slots that are not there, and that nothing sees.
        slots, prompt, canvas, target_mask, row_positions = jax.tree.map(
            lambda x: jnp.pad(x, ((0, 0), (0, size))),
            (Slots.of(reading.batch), reading.tokens(blank, vocabulary), blank, batch.target_mask, batch.positions),
        )
        length = batch.tokens.shape[1]
        first_target, num_targets = target_range(target_mask)
        tail = into_block(self.attention, row_positions, first_target)
        cut = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size))

        # The inputs in one pass. It fills the slots of the targets too, but none is seen before it is written anew.
        cache = KVCache.empty(model.config, slots)
        hidden, cache = model.extend(prompt, self.attention, cache, jnp.zeros_like(first_target), encoded)
        # Shifted, the slot before a block predicts its first token. The cache may begin with the start token.
        ahead = 1 if shifted and vocabulary.reads_start else 0
        last_input = jnp.maximum(first_target + ahead - 1, 0)
        before = jnp.take_along_axis(hidden, last_input[:, None, None], axis=1) if shifted else None

        def write_block(carry):
            start = jnp.minimum(first_target - tail + carry["block"] * size, length)
            is_target = cut(target_mask, start) & ~carry["finished"][:, None]
            positions = cut(row_positions, start)

            def show(carry, written):
                return show_rows(carry, start, written.tokens, written.mask, written.log_probability)

            def extend(tokens, carry):
                hidden, cache = model.extend(tokens, self.attention, carry["cache"], start + ahead, encoded)
                return hidden, carry | {"cache": cache}

            def read(tokens, carry):
                if not shifted:
                    return extend(start_first(tokens, positions, vocabulary), carry)
                hidden, carry = extend(tokens, carry)
                # What no slot is before is predicted in its own.
                first = jnp.where((start + ahead == 0)[:, None, None], hidden[:, :1], carry["before"])
                return jnp.concatenate([first, hidden[:, :-1]], axis=1), carry

            number = carry["block"] + 1
            span = carry["text"] and carry["text"].replace(left=jnp.maximum(num_targets + tail - number * size, 0))
            block = Canvas.start(cut(carry["canvas"], start), is_target, carry["score"], span)
            block, carry = denoise(inner, model, block, positions, keys, read, show, carry)
            tokens = block.tokens
            hidden, carry = extend(tokens, carry)
            carry = show(carry, Written(tokens, jnp.zeros(tokens.shape, bool), block.log_probability, block.score))
            ends = is_target & vocabulary.is_end(tokens)
            return carry | {
                "block": number,
                "text": span and span.advance(inner.language, tokens, is_target),
                "canvas": write_rows(carry["canvas"], tokens, start),
                "written_at": write_rows(carry["written_at"], block.written_at, start),
                "log_probability": write_rows(carry["log_probability"], block.log_probability, start),
                "score": block.score,
                "before": hidden[:, -1:] if shifted else None,
                "finished": carry["finished"] | jnp.any(ends, axis=-1) | (number * size >= num_targets + tail),
                "row_steps": carry["row_steps"] + block.row_steps + ~carry["finished"],
            }

        num_steps = -(-length // size) * (inner.most_steps(size) + 1)
        carry = {
            **start_row(canvas, num_targets == 0, start_trace(trace, canvas, num_steps, length=length)),
            "block": jnp.int32(0),
            "text": inner.language and Span.whole(inner.language, len(canvas)),
            "log_probability": jnp.zeros(canvas.shape, jnp.float32),
            "cache": cache,
            "before": before,
        }
        carry = jax.lax.while_loop(lambda carry: ~jnp.all(carry["finished"]), write_block, carry)
        decoded = end_rows(carry, batch, vocabulary)
        num_written = jnp.sum(decoded.written_at >= 0, axis=-1)
        return decoded.replace(
            scores=decoded.scores / jnp.maximum(num_written, 1), log_probability=carry["log_probability"][:, :length]
        )


def end_rows(carry: Carry, batch: Batch, vocabulary: TokenIds, first: int = 0) -> Decoded:
    """Returns the output of a loop over blocks; its rows have the batch's slots from `first` on."""
    end = first + batch.tokens.shape[1]
    canvas, written_at, history = (
        jax.tree.map(lambda x: x[..., first:end], carry[name]) for name in ("canvas", "written_at", "trace")
    )
    return Decoded.of(
        canvas,
        batch,
        vocabulary,
        scores=carry["score"],
        steps=carry["steps"],
        row_steps=carry["row_steps"],
        written_at=written_at,
        trace=history and history.end(carry["steps"]),
        num_drafted=carry.get("num_drafted"),
        num_accepted=carry.get("num_accepted"),
    )


def show_rows(carry: Carry, start: IntB, tokens: IntBL, mask: BoolBL, log_probability: FloatBL) -> Carry:
    """Records one more step; the canvas gets these values from each row's start on."""
    if carry["trace"] is not None:
        canvas = carry["canvas"]
        mask, log_probability = (
            write_rows(jnp.zeros(canvas.shape, x.dtype), x, start) for x in (mask, log_probability)
        )
        shown = write_rows(canvas, tokens, start)
        carry = carry | {"trace": carry["trace"].record(carry["steps"], shown, mask, log_probability)}
    return carry | {"steps": carry["steps"] + 1}


def start_row(canvas: IntBL, finished: BoolB, history: Trace | Watched | None) -> Carry:
    """Returns the text part of the state of a loop over a row's blocks, before it writes any."""
    return {
        "canvas": canvas,
        "written_at": jnp.full_like(canvas, -1),
        "finished": finished,
        "score": jnp.zeros(len(canvas), jnp.float32),
        "steps": jnp.int32(0),
        "row_steps": jnp.zeros(len(canvas), jnp.int32),
        "trace": history,
    }
