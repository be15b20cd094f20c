"""Block decoding: masked decoding inside a block, over an exact cache of the blocks before (arXiv 2503.09573)."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.decoding.decoder import Decoded, end_at_eos
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.models.attention import KVCache, write_rows
from diffusion_t5x.models.masks import AttentionKind, Slots
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.objectives.masked import start_first
from diffusion_t5x.objectives.objective import row_keys


@dataclasses.dataclass(frozen=True)
class BlockDecoder:
    """Writes block after block of targets. Earlier blocks and the inputs never change, and are computed once.

    A row stops after the block in which it has written EOS or pad; what stands behind that is dropped. The score is
    the mean over the written targets of the log-probability that a token had when it was written, as in
    `MaskedDecoder`. Every block costs one pass more than it has steps: that of its finished tokens, for the cache.

    Attributes:
      block_size: targets a block, as in training.
      inner: how a block is written; its `num_steps` are those of a block.
    """

    block_size: int = 4
    inner: MaskedDecoder = MaskedDecoder(num_steps=4)  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        self.attention  # noqa: B018  (raises on a bad block size)

    @property
    def attention(self) -> AttentionKind:
        return AttentionKind("block_causal", self.block_size)

    def decode(self, model: Transformer, batch: Batch, key: jax.Array, trace: bool = False) -> Decoded:
        vocabulary, size = model.vocabulary, self.block_size
        keys = row_keys(key, batch.example_ids)
        encoded = model.encode(batch)
        # Room for the last block of any row, beyond its end: slots that are not there, and that nothing sees.
        slots, target_mask, canvas = jax.tree.map(
            lambda x: jnp.pad(x, ((0, 0), (0, size))),
            (Slots.of(batch), batch.target_mask, jnp.where(batch.target_mask, vocabulary.mask_id, batch.tokens)),
        )
        length = batch.tokens.shape[1]
        first_target = jnp.argmax(target_mask, axis=-1)
        num_targets = jnp.sum(target_mask, axis=-1)
        cut = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size))

        # The inputs in one pass. It fills the slots of the targets too, but none is seen before it is written anew.
        cache = KVCache.empty(model.config, slots)
        _, cache = model.extend(canvas, self.attention, cache, jnp.zeros_like(first_target), encoded)

        def unfinished(carry):
            return ~jnp.all(carry["finished"])

        def write_block(carry):
            start = jnp.minimum(first_target + carry["block"] * size, length)
            is_target = cut(target_mask, start) & ~carry["finished"][:, None]
            positions = cut(slots.positions, start)

            def eligible(tokens):
                return is_target & (tokens == vocabulary.mask_id)

            def write_some(inner):
                step, tokens, carry = inner
                read = start_first(tokens, positions, vocabulary)
                hidden, cache = model.extend(read, self.attention, carry["cache"], start, encoded)
                tokens, log_probability = self.inner.write(
                    model, hidden, tokens, eligible(tokens), positions, keys, step
                )
                carry = carry | {"cache": cache, "total": carry["total"] + log_probability, "steps": carry["steps"] + 1}
                if trace:
                    shown = write_rows(carry["canvas"], tokens, start)
                    carry["history"] = carry["history"].at[carry["steps"]].set(shown)
                return step + 1, tokens, carry

            tokens = cut(carry["canvas"], start)
            inner = jax.lax.while_loop(lambda inner: jnp.any(eligible(inner[1])), write_some, (0, tokens, carry))
            _, tokens, carry = inner
            _, cache = model.extend(tokens, self.attention, carry["cache"], start, encoded)
            ends = is_target & ((tokens == vocabulary.eos_id) | (tokens == vocabulary.pad_id))
            block = carry["block"] + 1
            steps = carry["steps"] + 1
            canvas = write_rows(carry["canvas"], tokens, start)
            if trace:
                carry["history"] = carry["history"].at[steps].set(canvas)
            return carry | {
                "block": block,
                "canvas": canvas,
                "cache": cache,
                "finished": carry["finished"] | jnp.any(ends, axis=-1) | (block * size >= num_targets),
                "steps": steps,
            }

        carry = {
            "block": 0,
            "canvas": canvas,
            "cache": cache,
            "finished": num_targets == 0,
            "total": jnp.zeros(len(canvas)),
            "steps": 0,
        }
        most_steps = -(-length // size) * (min(self.inner.num_steps or size, size) + 1)
        if trace:
            carry["history"] = jnp.broadcast_to(canvas, (most_steps + 1, *canvas.shape))
        carry = jax.lax.while_loop(unfinished, write_block, carry)
        written = batch.target_mask & (carry["canvas"][:, :length] != vocabulary.mask_id)
        history = None
        if trace:  # steps after the last one that was taken show the end
            taken = jnp.arange(most_steps + 1)[:, None, None] <= carry["steps"]
            history = jnp.where(taken, carry["history"], carry["canvas"])[..., :length]
        return Decoded(
            tokens=end_at_eos(carry["canvas"][:, :length], batch, vocabulary),
            scores=carry["total"] / jnp.maximum(jnp.sum(written, axis=-1), 1),
            steps=jnp.asarray(carry["steps"]),
            trace=history,
        )
