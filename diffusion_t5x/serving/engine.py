"""The protocol of engines, which decode the rows of requests, and one for decoders that write whole rows alone."""

from collections.abc import Hashable, Iterable
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.text_rows import room_for
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.slots import Finished, Progress
from diffusion_t5x.models.streams import sample_key
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.shapes import KeyScalar

Event = Progress | Finished


class Engine(Protocol):
    """Decodes rows that come and go. It is used by one thread alone."""

    def submit(self, ident: Hashable, row: Batch, *, seed: int, sample: int) -> None:
        """Queues a batch of one row, which draws from a sample's key of the seed."""

    def cancel(self, ident: Hashable) -> None:
        """Drops a row that is queued or being written. No event follows; an unknown row is no error."""

    def advance(self) -> Iterable[Event]:
        """Decodes a piece of the rows that have begun, and returns what is new."""


class OneByOne:
    """An engine for any decoder: a row waits until the ones before it are written, and shows no progress.

    Args:
      mesh: the device mesh.
      definition, params: the model.
      decoder: writes the rows.
    """

    def __init__(self, mesh: Mesh, definition: ModelDefinition, params: Params, decoder: Decoder):
        self._mesh, self._params = mesh, params
        self._waiting: dict[Hashable, tuple[Batch, KeyScalar]] = {}

        def step(params, batch, key):
            return decoder.decode(definition.bind(params), batch, key)

        self._step = jax.jit(step, out_shardings=partitioning.replicated(mesh))

    def submit(self, ident: Hashable, row: Batch, *, seed: int, sample: int) -> None:
        self._waiting[ident] = row, sample_key(jax.random.key(seed), sample)

    def cancel(self, ident: Hashable) -> None:
        self._waiting.pop(ident, None)

    def advance(self) -> Iterable[Event]:
        if self._waiting:
            ident, (row, key) = next(iter(self._waiting.items()))
            width, row = row.tokens.shape[1], jax.tree.map(_padded, row)
            with jax.set_mesh(self._mesh):
                decoded = self._step(self._params, partitioning.put_batch(self._mesh, row), key)
                decoded = jax.device_get(decoded)
            del self._waiting[ident]
            yield Finished(ident, jax.tree.map(lambda x: x[:, :width] if x.ndim == 2 else x, decoded))


def _padded(x: np.ndarray) -> np.ndarray:
    """Returns an array of a row with empty slots behind it: rows of few lengths need few programs."""
    return np.pad(x, ((0, 0), (0, room_for(x.shape[1]) - x.shape[1]))) if x.ndim == 2 else x
