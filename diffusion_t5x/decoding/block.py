"""Block decoding: diffusion inside a block, over an exact cache of earlier blocks (arXiv 2503.09573, section 3.2)."""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.allowed_texts import Span
from diffusion_t5x.decoding.canvas import Canvas, StepRule, Written, denoise
from diffusion_t5x.decoding.decoder import Decoded, Watch, into_block, start_trace, target_range
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.rows import Carry, RowDecoder, cut, end_rows, read_inputs, show_rows, start_row
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.attention import KVCache, write_rows
from diffusion_t5x.models.masks import AttentionKind, BlocksFrom, Slots
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.reading import Reading, check_blocks, start_first
from diffusion_t5x.models.streams import row_keys
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import KeyB, KeyScalar


@dataclasses.dataclass(frozen=True)
class BlockDecoder(RowDecoder):
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

    @property
    def samples_model(self) -> bool:
        return self.inner.samples_model

    def within(self, language: Language) -> Self:
        return dataclasses.replace(self, inner=self.inner.within(language))

    @property
    def attention(self) -> AttentionKind:
        return AttentionKind("block_causal", self.block_size, self.blocks_from)

    @property
    def modes(self) -> tuple[Mode, ...]:
        return tuple(Mode.of(self.attention, mode.noise) for mode in self.inner.modes)

    def start(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar | KeyB,
        trace: bool | Watch = False,
        piece: int | None = None,
    ) -> Carry:
        vocabulary, shifted, size = model.vocabulary, model.config.shifted, self.block_size
        keys = row_keys(key, batch.example_ids)
        check_blocks(self.attention, shifted)
        encoded = model.encode(batch)
        reading = Reading.of(batch, vocabulary, shifted)
        blank = self.inner.blank(batch, vocabulary, keys)
        # Room for the last block of any row, beyond its end: slots that are not there, and that nothing sees.
        slots, prompt, canvas, target_mask, positions = jax.tree.map(
            lambda x: jnp.pad(x, ((0, 0), (0, size))),
            (Slots.of(reading.batch), reading.tokens(blank, vocabulary), blank, batch.target_mask, batch.positions),
        )
        length = batch.tokens.shape[1]
        first_target, num_targets = target_range(target_mask)
        tail = into_block(self.attention, positions, first_target)
        ahead = _ahead(model)
        # Shifted, the slot before a block predicts its first token.
        before, cache = read_inputs(
            model, prompt, self.attention, KVCache.empty(model.config, slots), first_target + ahead, encoded, piece
        )
        num_steps = -(-length // size) * (self.inner.most_steps(size) + 1)
        return {
            **start_row(batch, keys, encoded, canvas, start_trace(trace, canvas, num_steps, length=length)),
            "target_mask": target_mask,
            "positions": positions,
            "start": first_target - tail,
            "end": first_target + num_targets,
            "log_probability": jnp.zeros(canvas.shape, jnp.float32),
            "cache": cache,
            "before": before if shifted else None,
            "text": self.inner.language and Span.whole(self.inner.language, len(canvas)),
        }

    def advance(self, model: Transformer, carry: Carry) -> Carry:
        """Writes a block of each row."""
        vocabulary, shifted, size = model.vocabulary, model.config.shifted, self.block_size
        ahead = _ahead(model)
        start = jnp.minimum(carry["start"], carry["batch"].tokens.shape[1])
        is_target = cut(carry["target_mask"], start, size) & ~carry["finished"][:, None]
        positions = cut(carry["positions"], start, size)

        def show(carry, written):
            return show_rows(carry, start, written.tokens, written.mask, written.log_probability)

        def extend(tokens, carry):
            hidden, cache = model.extend(tokens, self.attention, carry["cache"], start + ahead, carry["encoded"])
            return hidden, carry | {"cache": cache}

        def read(tokens, carry):
            if not shifted:
                return extend(start_first(tokens, positions, vocabulary), carry)
            hidden, carry = extend(tokens, carry)
            # What no slot is before is predicted in its own.
            first = jnp.where((start + ahead == 0)[:, None, None], hidden[:, :1], carry["before"])
            return jnp.concatenate([first, hidden[:, :-1]], axis=1), carry

        text = carry["text"]
        span = text and text.replace(left=jnp.maximum(carry["end"] - start - size, 0))
        block = Canvas.start(cut(carry["canvas"], start, size), is_target, carry["score"], span)
        block, carry = denoise(self.inner, model, block, positions, carry["keys"], read, show, carry)
        tokens = block.tokens
        hidden, carry = extend(tokens, carry)
        carry = show(carry, Written(tokens, jnp.zeros(tokens.shape, bool), block.log_probability, block.score))
        ends = is_target & vocabulary.is_end(tokens)
        return carry | {
            "start": start + size,
            "canvas": write_rows(carry["canvas"], tokens, start),
            "written_at": write_rows(carry["written_at"], block.written_at, start),
            "log_probability": write_rows(carry["log_probability"], block.log_probability, start),
            "score": block.score,
            "before": hidden[:, -1:] if shifted else None,
            "finished": carry["finished"] | jnp.any(ends, axis=-1) | (start + size >= carry["end"]),
            "row_steps": carry["row_steps"] + block.row_steps + ~carry["finished"],
            "text": span and span.advance(self.inner.language, tokens, is_target),
        }

    def finish(self, vocabulary: TokenIds, carry: Carry) -> Decoded:
        decoded = end_rows(carry, vocabulary)
        num_written = jnp.sum(decoded.written_at >= 0, axis=-1)
        length = decoded.tokens.shape[1]
        return decoded.replace(
            scores=decoded.scores / jnp.maximum(num_written, 1), log_probability=carry["log_probability"][:, :length]
        )


def _ahead(model: Transformer) -> int:
    """Returns the number of slots by which the cache is ahead of the rows: it may begin with the start token."""
    return 1 if model.config.shifted and model.vocabulary.reads_start else 0
