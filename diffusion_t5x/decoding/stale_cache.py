"""Passes over a window of a row with bidirectional attention; other slots stay as when the row was last read."""

import dataclasses
from collections.abc import Callable
from typing import Literal, Self

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.decoding.canvas import StepRule, check_guidance
from diffusion_t5x.models.attention import KVCache
from diffusion_t5x.models.masks import BIDIRECTIONAL, Slots
from diffusion_t5x.models.reading import Reading
from diffusion_t5x.models.slots import put_slots, slots_where, take_slots
from diffusion_t5x.models.stack import Encoded
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import BoolB, BoolBL, FloatB, FloatBLD, IntBL, IntBQ, IntScalar

Cached = Literal["prefix", "dual"]


class Memory(flax.struct.PyTreeNode):
    """Results of earlier passes for every slot that the model reads.

    Attributes:
      cache: keys and values.
      hidden: hidden states from the pass that read a slot last.
      age: steps since all rows were read whole; 0: the next pass must read them whole.
      read, seen: tokens and hidden states of the pass that read the row whole, where drift is measured; otherwise None.
    """

    cache: KVCache
    hidden: FloatBLD
    age: IntScalar
    read: IntBL | None
    seen: FloatBLD | None

    def where(self, rows: BoolB, other: Self) -> Self:
        """Returns this memory for rows where the mask is True, and the other for the rest."""

        def choose(one, another, axis=0):
            return jnp.where(rows.reshape(-1, *[1] * (one.ndim - axis - 1)), one, another)

        cache = other.cache.replace(
            keys=choose(self.cache.keys, other.cache.keys, 1),
            values=choose(self.cache.values, other.cache.values, 1),
        )
        kept = {name: choose(getattr(self, name), getattr(other, name)) for name in ("hidden", "read", "seen")}
        return other.replace(cache=cache, **kept)


@dataclasses.dataclass(frozen=True)
class StaleReader:
    """Reads a window of each row over a cache of the rest, with guidance if asked for.

    Attributes:
      model: reads.
      reading: the rows; with guidance, once more without inputs.
      encoded: the inputs of an encoder-decoder.
      input_mask: the inputs among the tokens.
      window: number of targets in a window.
      cached: see `WindowDecoder`.
      refresh_every, refresh_drift: see `WindowDecoder`.
      guidance: see `StepRule`.
    """

    model: Transformer
    reading: Reading
    encoded: Encoded | None
    input_mask: BoolBL
    window: int
    cached: Cached
    refresh_every: int | None
    refresh_drift: float | None
    guidance: float

    @classmethod
    def of(
        cls,
        model: Transformer,
        batch: Batch,
        rule: StepRule,
        window: int,
        cached: Cached,
        refresh_every: int | None,
        refresh_drift: float | None,
    ) -> Self:
        """Returns the reader of a batch for this rule; raises a UserError for guidance of capped logits."""
        rows, mask_id = batch, model.vocabulary.mask_id
        if rule.guidance:
            check_guidance(rule, model)
            inputs = batch.encoder_tokens
            blind = batch if inputs is None else batch.replace(encoder_tokens=jnp.full_like(inputs, mask_id))
            rows = jax.tree.map(lambda one, other: jnp.concatenate([one, other]), batch, blind)
        reading = Reading.of(rows, model.vocabulary, model.config.shifted)
        input_mask = jnp.asarray(batch.input_mask)
        encoded = model.encode(rows)
        return cls(model, reading, encoded, input_mask, window, cached, refresh_every, refresh_drift, rule.guidance)

    def start(self) -> Memory:
        """Returns the memory before the first pass."""
        config, slots = self.model.config, Slots.of(self.reading.batch)
        shape = slots.positions.shape
        hidden = jnp.zeros((*shape, config.embed_dim), config.dtype)
        drifts = self.refresh_drift is not None
        return Memory(
            cache=KVCache.empty(config, slots),
            hidden=hidden,
            age=jnp.int32(0),
            read=jnp.zeros(shape, jnp.int32) if drifts else None,
            seen=hidden if drifts else None,
        )

    def read(self, tokens: IntBL, window: IntScalar, memory: Memory) -> tuple[FloatBLD, Memory]:
        """Returns the hidden states that predict the tokens, as far as they are read, and the memory after the pass.

        Args:
          tokens: the rows.
          window: number of the window that is being written.
          memory: of earlier passes; of age 0, the rows are read whole.
        """
        if self.guidance:
            tokens = jnp.concatenate([tokens, jnp.where(self.input_mask, self.model.vocabulary.mask_id, tokens)])
        read = self.reading.tokens(tokens, self.model.vocabulary)
        memory = jax.lax.cond(
            memory.age == 0, lambda: self._whole(read, memory), lambda: self._part(read, window, memory)
        )
        age = memory.age + 1
        memory = memory.replace(age=age if self.refresh_every is None else age % self.refresh_every)
        states = self.reading.states(memory.hidden)
        if self.guidance:  # logits are linear in these hidden states
            seen, unseen = jnp.split(states, 2)
            states = unseen + (1 + self.guidance) * (seen - unseen)
        return states, memory

    def _whole(self, read: IntBL, memory: Memory) -> Memory:
        """Reads the rows whole."""
        hidden, cache = self.model.extend(
            read, BIDIRECTIONAL, memory.cache, jnp.zeros(len(read), jnp.int32), self.encoded
        )
        memory = memory.replace(cache=cache, hidden=hidden)
        return memory if memory.seen is None else memory.replace(read=read, seen=hidden)

    def _part(self, read: IntBL, window: IntScalar, memory: Memory) -> Memory:
        """Reads the window, with what comes after it unless that is cached too; rows that drift are read whole."""
        targets = jnp.asarray(self.reading.batch.target_mask)
        is_in = targets & ((jnp.cumsum(targets, axis=-1) - 1) // self.window == window)
        if self.cached == "dual":
            after = self._extend(read, slots_where(is_in, self.window), memory)
        else:
            after = self._read_on(read, is_in, memory)
        if self.refresh_drift is None:
            return after
        drifts = self._drift(read, is_in, after) >= self.refresh_drift
        return jax.lax.cond(jnp.any(drifts), lambda: self._whole(read, memory).where(drifts, after), lambda: after)

    def _read_on(self, read: IntBL, is_in: BoolBL, memory: Memory) -> Memory:
        """Reads from the window's first target to the end.

        How far that is differs between rows and windows, but programs have fixed lengths: the pass has the first of
        the lengths W, 2 W, 4 W ... that is enough for all rows.
        """
        onward = (jnp.cumsum(is_in, axis=-1) > 0) & (self.reading.batch.segment_ids > 0)
        length, lengths = read.shape[1], [self.window]
        while lengths[-1] < length:
            lengths.append(min(2 * lengths[-1], length))

        def extend(most: int) -> Callable[[], Memory]:
            return lambda: self._extend(read, slots_where(onward, most), memory)

        enough = jnp.searchsorted(jnp.asarray(lengths), jnp.max(jnp.sum(onward, axis=-1)))
        return jax.lax.switch(enough, [extend(most) for most in lengths])

    def _extend(self, read: IntBL, slots: IntBQ, memory: Memory) -> Memory:
        """Reads these slots over the cache of the others."""
        hidden, cache = self.model.extend(take_slots(read, slots), BIDIRECTIONAL, memory.cache, slots, self.encoded)
        return memory.replace(cache=cache, hidden=put_slots(memory.hidden, slots, hidden))

    def _drift(self, read: IntBL, is_in: BoolBL, memory: Memory) -> FloatB:
        """Returns 1 - cosine between the hidden states now and when the row was read whole.

        It is the mean over the window's slots whose tokens are unchanged since then; 0 without any.
        """
        assert memory.read is not None and memory.seen is not None
        same = is_in & (read == memory.read)
        now, then = memory.hidden.astype(jnp.float32), memory.seen.astype(jnp.float32)
        norms = jnp.linalg.norm(now, axis=-1) * jnp.linalg.norm(then, axis=-1)
        cosine = jnp.sum(now * then, axis=-1) / jnp.maximum(norms, 1e-30)
        count = jnp.sum(same, axis=-1)
        return jnp.sum(jnp.where(same, 1 - cosine, 0), axis=-1) / jnp.maximum(count, 1)
