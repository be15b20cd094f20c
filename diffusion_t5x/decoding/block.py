"""Block decoding: diffusion inside a block, over an exact cache of the blocks before (arXiv 2503.09573)."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.decoder import Decoded, Decoder, Watch, Written, start_trace
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.attention import KVCache, write_rows
from diffusion_t5x.models.masks import AttentionKind, Slots
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.objectives.objective import row_keys
from diffusion_t5x.objectives.reading import Reading, start_first


class InnerDecoder(Protocol):
    """What writes the targets of a block: `MaskedDecoder`, or `SundaeDecoder` with one sample and paper 1's steps."""

    @property
    def modes(self) -> tuple[Mode, ...]:
        """As of a `Decoder`; in a block the attention is the block's."""

    def blank(self, batch: Batch, vocabulary: TokenIds, keys: jax.Array) -> jax.Array:
        """The rows int32 `[B, L]` with what stands at the targets before the first step; keys `[B]`."""

    def eligible(self, canvas: jax.Array, target_mask: jax.Array, vocabulary: TokenIds, step: jax.Array) -> jax.Array:
        """bool `[B, L]`: targets that are still to be written at this step."""

    def most_steps(self, num_targets: int) -> int:
        """At most so many steps write so many targets."""

    def write(
        self,
        model: Transformer,
        hidden: jax.Array,
        canvas: jax.Array,
        eligible: jax.Array,
        positions: jax.Array,
        keys: jax.Array,
        step: jax.Array,
    ) -> Written:
        """One step.

        Args:
          model: reads the logits out.
          hidden: `[B, L, D]`, of this canvas.
          canvas: int32 `[B, L]`, or a part of it.
          eligible: bool `[B, L]`, what is still to be written.
          positions: int32 `[B, L]`; what is drawn at a position depends on its number alone.
          keys: `[B]`, a key for each row.
          step: how many steps were taken before.
        """


@dataclasses.dataclass(frozen=True)
class BlockDecoder(Decoder):
    """Writes block after block of targets. Earlier blocks and the inputs never change, and are computed once.

    A row stops after the block in which it has written EOS or pad; what stands behind that is dropped. The score is
    the mean over the written targets of what the inner decoder says of them. Every block costs one pass more than it
    has steps: that of its finished tokens, for the cache.

    A shifted model (`ModelConfig.shifted`) predicts the first token of a block in the slot of the finished token before
    the block: see `objectives.block.Block`.

    Attributes:
      block_size: targets a block, as in training.
      inner: how a block is written; its `num_steps` are those of a block. Masked for models of masked blocks, SUNDAE's
        with one sample for those of uniform noise.
    """

    block_size: int = 4
    inner: InnerDecoder = MaskedDecoder(num_steps=4)  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        self.attention  # noqa: B018  (raises on a bad block size)
        whole = {"num_samples": 1, "method": "sample", "update_share": 1.0, "stop_when_unchanged": False}
        for name, value in whole.items():  # what SundaeDecoder has for whole canvases alone
            if getattr(self.inner, name, value) != value:
                raise UserError(
                    f"BlockDecoder.inner must have {name} = {value!r}: a block is written once, all of it at each "
                    f"step; got {self.inner}."
                )

    @property
    def attention(self) -> AttentionKind:
        return AttentionKind("block_causal", self.block_size)

    @property
    def modes(self) -> tuple[Mode, ...]:
        return tuple(Mode.of(self.attention, mode.noise) for mode in self.inner.modes)

    def decode(self, model: Transformer, batch: Batch, key: jax.Array, trace: bool | Watch = False) -> Decoded:
        vocabulary, shifted = model.vocabulary, model.config.shifted
        size, inner = self.block_size, self.inner
        keys = row_keys(key, batch.example_ids)
        encoded = model.encode(batch)
        reading = Reading.of(batch, vocabulary, shifted)
        blank = inner.blank(batch, vocabulary, keys)
        # Room for the last block of any row, beyond its end: slots that are not there, and that nothing sees.
        slots, prompt, canvas, target_mask, row_positions = jax.tree.map(
            lambda x: jnp.pad(x, ((0, 0), (0, size))),
            (Slots.of(reading.batch), reading.tokens(blank, vocabulary), blank, batch.target_mask, batch.positions),
        )
        length = batch.tokens.shape[1]
        first_target = jnp.argmax(target_mask, axis=-1)
        num_targets = jnp.sum(target_mask, axis=-1)
        cut = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size))

        # The inputs in one pass. It fills the slots of the targets too, but none is seen before it is written anew.
        cache = KVCache.empty(model.config, slots)
        hidden, cache = model.extend(prompt, self.attention, cache, jnp.zeros_like(first_target), encoded)
        # Shifted, the cache begins with the start token, and the slot before a block predicts its first token.
        ahead = 1 if shifted else 0
        before = jnp.take_along_axis(hidden, first_target[:, None, None], axis=1) if shifted else None

        def unfinished(carry):
            return ~jnp.all(carry["finished"])

        def write_block(carry):
            start = jnp.minimum(first_target + carry["block"] * size, length)
            is_target = cut(target_mask, start) & ~carry["finished"][:, None]
            positions = cut(row_positions, start)

            def show(carry, tokens, mask, log_probability):
                steps = carry["steps"]
                if trace:
                    canvas = write_rows(carry["canvas"], tokens, start)
                    mask = write_rows(jnp.zeros(canvas.shape, bool), mask, start)
                    log_probability = write_rows(jnp.zeros(canvas.shape), log_probability, start)
                    carry["trace"] = carry["trace"].record(steps, canvas, mask, log_probability)
                return carry | {"steps": steps + 1}

            def to_write(block):
                return inner.eligible(block["tokens"], is_target, vocabulary, block["step"])

            def write_some(block):
                carry, step, eligible = block["carry"], block["step"], to_write(block)
                read = block["tokens"] if shifted else start_first(block["tokens"], positions, vocabulary)
                hidden, cache = model.extend(read, self.attention, carry["cache"], start + ahead, encoded)
                if shifted:
                    hidden = jnp.concatenate([carry["before"], hidden[:, :-1]], axis=1)
                written = inner.write(model, hidden, block["tokens"], eligible, positions, keys, step)
                carry |= {
                    "cache": cache,
                    "total": carry["total"] + written.score,
                    "row_steps": carry["row_steps"] + jnp.any(eligible, axis=-1),
                }
                return {
                    "tokens": written.tokens,
                    "step": step + 1,
                    "written_at": jnp.where(written.mask, step, block["written_at"]),
                    "carry": show(carry, written.tokens, written.mask, written.log_probability),
                }

            block = {"tokens": cut(carry["canvas"], start), "step": 0, "written_at": jnp.full(is_target.shape, -1)}
            block = jax.lax.while_loop(lambda b: jnp.any(to_write(b)), write_some, block | {"carry": carry})
            tokens, carry = block["tokens"], block["carry"]
            hidden, cache = model.extend(tokens, self.attention, carry["cache"], start + ahead, encoded)
            ends = is_target & ((tokens == vocabulary.eos_id) | (tokens == vocabulary.pad_id))
            number = carry["block"] + 1
            carry = show(carry, tokens, jnp.zeros(tokens.shape, bool), jnp.zeros(tokens.shape))
            return carry | {
                "block": number,
                "canvas": write_rows(carry["canvas"], tokens, start),
                "written_at": write_rows(carry["written_at"], block["written_at"], start),
                "cache": cache,
                "before": hidden[:, -1:] if shifted else None,
                "finished": carry["finished"] | jnp.any(ends, axis=-1) | (number * size >= num_targets),
                "row_steps": carry["row_steps"] + ~carry["finished"],
            }

        rows = len(canvas)
        carry = {
            "block": 0,
            "canvas": canvas,
            "written_at": jnp.full_like(canvas, -1),
            "cache": cache,
            "before": before,
            "finished": num_targets == 0,
            "total": jnp.zeros(rows),
            "steps": 0,
            "row_steps": jnp.zeros(rows, jnp.int32),
            "trace": start_trace(trace, canvas, -(-length // size) * (inner.most_steps(size) + 1), length=length),
        }
        carry = jax.lax.while_loop(unfinished, write_block, carry)
        canvas, written_at, history = (
            jax.tree.map(lambda x: x[..., :length], carry[name]) for name in ("canvas", "written_at", "trace")
        )
        return Decoded.of(
            canvas,
            batch,
            vocabulary,
            scores=carry["total"] / jnp.maximum(jnp.sum(written_at >= 0, axis=-1), 1),
            steps=jnp.asarray(carry["steps"]),
            row_steps=carry["row_steps"],
            written_at=written_at,
            trace=history and history.end(carry["steps"]),
        )
