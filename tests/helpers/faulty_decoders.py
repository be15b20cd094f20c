"""Decoders of a user's own, each with a fault that makes a text depend on its neighbours."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_t5x.decoding.masked import MaskedDecoder


@dataclasses.dataclass(frozen=True)
class Neighbours(MaskedDecoder):
    """A row's hidden states are mixed with those of the row before it."""

    share: float = 0.5

    def write(self, model, hidden, canvas, eligible, positions, keys):
        hidden = (1 - self.share) * hidden + self.share * jnp.roll(hidden, 1, axis=0)
        return super().write(model, hidden, canvas, eligible, positions, keys)


@dataclasses.dataclass(frozen=True)
class DrawsByRow(MaskedDecoder):
    """Draws depend on the row's number, which no probability shows."""

    def write(self, model, hidden, canvas, eligible, positions, keys):
        keys = jax.vmap(jax.random.fold_in)(keys, jnp.arange(len(keys)))
        return super().write(model, hidden, canvas, eligible, positions, keys)
