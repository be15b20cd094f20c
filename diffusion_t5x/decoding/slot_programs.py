"""The compiled programs of decoding in slots."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.decoding.decoder import Decoded, Watch
from diffusion_t5x.decoding.rows import Carry, RowDecoder
from diffusion_t5x.models.streams import sample_key
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.shapes import IntB


class SlotPrograms:
    """Jitted functions of the state of all slots; the state that one takes is gone after the call.

    Attributes:
      begin: `(params, batch, keys, samples) -> carry`: the state of new rows, with key data `[B, n]` and samples `[B]`.
      admit: `(params, carry, batch, keys, samples, at) -> carry`: the state with new rows in the slots `at`.
      advance: `(params, carry) -> (carry, finished)`: the state after a stride, and which rows are finished.
      finish: `carry -> Decoded`.

    Args:
      mesh: the mesh for the rows.
      definition: the model.
      decoder, num_slots, piece, stride: see `SlotEngine`.
      watch: is shown every step.
    """

    def __init__(
        self,
        mesh: Mesh,
        definition: ModelDefinition,
        decoder: RowDecoder,
        num_slots: int,
        piece: int | None,
        stride: int,
        watch: Watch | None = None,
    ):
        self.definition, self.decoder, self.watch = definition, decoder, watch
        self.num_slots, self.piece, self.stride = num_slots, piece, stride
        whole = partitioning.replicated(mesh)
        self.begin = jax.jit(self._begin)
        self.admit = jax.jit(self._admit, donate_argnums=1)
        self.advance = jax.jit(self._advance, donate_argnums=1, out_shardings=(None, whole))
        self.finish = jax.jit(self._finish, out_shardings=whole)

    def _begin(self, params: Params, batch: Batch, keys: jax.Array, samples: IntB) -> Carry:
        """Returns the state of new rows."""
        row_keys = jax.vmap(sample_key)(jax.random.wrap_key_data(keys), samples)
        return self.decoder.start(self.definition.bind(params), batch, row_keys, self.watch or False, self.piece)

    def _admit(self, params: Params, carry: Carry, batch: Batch, keys: jax.Array, samples: IntB, at: IntB) -> Carry:
        """Returns the state with new rows in the slots `at`."""
        new = self._begin(params, batch, keys, samples)
        axes = self._axes(params, batch, keys, samples)

        def put(old, new, axis):
            if axis is None:
                return old
            times = old.shape[axis] // self.num_slots  # canvases of a row
            places = (at[:, None] * times + jnp.arange(times)).reshape(-1)
            return old.at[(slice(None),) * axis + (places,)].set(new)

        return jax.tree.map(put, carry, new, axes)

    def _axes(self, *rows: Any) -> Any:
        """Returns the axis of rows of each array of the state; None for scalars."""

        def shapes(number):
            params, *others = rows
            more = [jax.tree.map(lambda x: jax.ShapeDtypeStruct((number, *x.shape[1:]), x.dtype), x) for x in others]
            return jax.eval_shape(self._begin, params, *more)

        def axis(one, other):
            differing = [i for i, (x, y) in enumerate(zip(one.shape, other.shape, strict=True)) if x != y]
            return differing[0] if differing else None

        return jax.tree.map(axis, shapes(2), shapes(3))

    def _advance(self, params: Params, carry: Carry) -> tuple[Carry, jax.Array]:
        """Returns the state after a stride, and which rows are finished."""
        model = self.definition.bind(params)

        def unfinished(state):
            number, carry = state
            return (number < self.stride) & ~jnp.all(carry["finished"])

        def write(state):
            return state[0] + 1, self.decoder.advance(model, state[1])

        _, carry = jax.lax.while_loop(unfinished, write, (jnp.int32(0), carry))
        return carry, carry["finished"]

    def _finish(self, carry: Carry) -> Decoded:
        return self.decoder.finish(self.definition.vocabulary, carry)
