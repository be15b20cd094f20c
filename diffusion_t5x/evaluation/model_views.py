"""Views of a model: the same parameters, read without a cache or with logits that are slightly off."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from diffusion_t5x.models.attention import KVCache, write_rows
from diffusion_t5x.models.masks import AttentionKind
from diffusion_t5x.models.slots import put_slots, take_slots
from diffusion_t5x.models.stack import Encoded
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import FloatBLD, FloatBLV, FloatBQD, IntB, IntBL, IntBQ, IntScalar


class View:
    """A model that a decoder takes for the one behind it."""

    def __init__(self, model: Transformer):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *arguments: Any) -> Any:
        return self._model(*arguments)


class WholeRows(View):
    """Reads whole rows again in place of a cache of keys and values; the cache holds the rows' tokens.

    A decoder over an exact cache writes the same text with it. `num_extended` counts the passes that a decoder's
    program has over a cache.
    """

    def __init__(self, model: Transformer):
        super().__init__(model)
        self.num_extended = 0

    def extend(
        self,
        tokens: Int[jax.Array, "batch queries"],
        kind: AttentionKind,
        cache: KVCache,
        write_at: IntB | IntBQ,
        encoded: Encoded | None = None,
    ) -> tuple[FloatBQD, KVCache]:
        """Returns what `Transformer.extend` does, by a pass over the whole rows."""
        self.num_extended += 1
        held, in_a_row = _held(cache), write_at.ndim == 1
        held = write_rows(held, tokens, write_at) if in_a_row else put_slots(held, write_at, tokens)
        hidden = self._model(held, cache.slots, kind, encoded).hidden
        if in_a_row:
            start = jnp.minimum(write_at, held.shape[1] - tokens.shape[1])  # where the row's end moves them to
            write_at = start[:, None] + jnp.arange(tokens.shape[1])
        return take_slots(hidden, write_at), _hold(cache, held)


def _held(cache: KVCache) -> IntBL:
    """Returns the tokens that a cache holds."""
    digits = [x[0, :, :, 0, place].astype(jnp.int32) * size for x, place, size in _digits(cache)]
    return jnp.sum(jnp.stack(digits), axis=0)


def _hold(cache: KVCache, tokens: IntBL) -> KVCache:
    """Returns the cache with these tokens, in digits of base 256: exact in any number type, in a cache's own shape."""
    kept = {"keys": cache.keys, "values": cache.values}
    for name, (x, place, size) in zip(("keys", "values", "keys"), _digits(cache), strict=False):
        kept[name] = kept[name].at[0, :, :, 0, place].set((tokens // size % 256).astype(x.dtype))
    return cache.replace(**kept)


def _digits(cache: KVCache) -> list[tuple[jax.Array, int, int]]:
    """Returns where the digits of tokens are: in which array, in which dimension of a head, and their place value."""
    first_two = [(cache.keys, 0, 1), (cache.values, 0, 256)]
    return first_two if cache.keys.shape[-1] == 1 else [*first_two, (cache.keys, 1, 256**2)]


class Nudge(flax.struct.PyTreeNode):
    """A small change of logits.

    Attributes:
      lowered, raised: ids whose logits are lowered and raised; -1 for none.
      lowered_at, raised_at: position in the segment at which they are; -1 for all.
      down, up: by how much.
    """

    lowered: IntScalar
    raised: IntScalar
    lowered_at: IntScalar
    raised_at: IntScalar
    down: Float[jax.Array, ""]
    up: Float[jax.Array, ""]


class Nudged(View):
    """Answers with logits that are off by a `Nudge`.

    Positions are the last integers `[B, Q]` that a decoder hands to `map_logits`, as step rules do; without any, the
    nudge is at all positions.
    """

    def __init__(self, model: Transformer, nudge: Nudge):
        super().__init__(model)
        self._nudge = nudge

    def logits(self, hidden: Float[jax.Array, "batch *rest embed"]) -> Float[jax.Array, "batch *rest vocab"]:
        return self._off(self._model.logits(hidden), None)

    def map_logits(self, fn: Callable[..., Any], hidden: FloatBLD, *per_position: Any) -> Any:
        integers = [x for x in per_position if jnp.ndim(x) == 2 and jnp.issubdtype(jnp.asarray(x).dtype, jnp.integer)]
        positions = jnp.asarray(integers[-1]) if integers else jnp.full(hidden.shape[:2], -1)

        def off(logits: FloatBLV, positions: IntBQ, *others: Any) -> Any:
            return fn(self._off(logits, positions if integers else None), *others)

        return self._model.map_logits(off, hidden, positions, *per_position)

    def _off(self, logits: jax.Array, positions: IntBQ | None) -> jax.Array:
        ids, nudge = jnp.arange(logits.shape[-1]), self._nudge

        def hit(token: IntScalar, place: IntScalar) -> jax.Array:
            if positions is None:
                return ids == token
            return ((place < 0) | (positions == place))[..., None] & (ids == token)

        raised = jnp.where(hit(nudge.raised, nudge.raised_at), nudge.up, 0)
        return logits + raised - jnp.where(hit(nudge.lowered, nudge.lowered_at), nudge.down, 0)
