"""Saves arrays piece by piece, never whole in memory. Imports Orbax, as do `checkpoints.py` and `stored.py`."""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epy

with epy.lazy_imports():  # takes a while, and mistakes are answered without it
    import orbax.checkpoint as ocp


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A leaf for `Checkpoints.save` instead of an array.

    Attributes:
      shape, dtype: shape and dtype of the array.
      axis: the axis that it is cut along.
      step: size of a piece along this axis; the last piece may be smaller.
      read: returns the piece between two indices of the axis; called once for each piece, one at a time.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    axis: int
    step: int
    read: Callable[[int, int], np.ndarray]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def whole(self) -> np.ndarray:
        """Returns the whole array."""
        length = self.shape[self.axis]
        pieces = [self.read(start, min(start + self.step, length)) for start in range(0, length, self.step)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=self.axis)


def _handler() -> Any:
    import tensorstore

    class Handler(ocp.type_handlers.NumpyHandler):
        """Saves as a numpy array is saved, in chunks that are the pieces."""

        def __init__(self):
            super().__init__(deepcopy_host_arrays=False)

        async def _background_serialize(self, *args: Any) -> None:
            self._one_at_a_time = asyncio.Lock()  # of this save's event loop
            await super()._background_serialize(*args)

        async def _open_and_write(self, value: Streamed, tspec: dict[str, Any], ts_context: Any) -> None:
            chunk = list(value.shape)
            chunk[value.axis] = value.step
            tspec["metadata"]["chunks"] = chunk
            async with self._one_at_a_time:
                store = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context)
                for start in range(0, value.shape[value.axis], value.step):
                    stop = min(start + value.step, value.shape[value.axis])
                    where = (slice(None),) * value.axis + (slice(start, stop),)
                    await store[where].write(value.read(start, stop), can_reference_source_data_indefinitely=True)

    return Handler()


def handlers() -> "ocp.handlers.CheckpointHandlerRegistry":
    """Returns the handlers with which a checkpoint manager saves `Streamed` leaves in its item "state"."""
    kinds = (
        (jax.Array, ocp.type_handlers.ArrayHandler()),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (Streamed, _handler()),
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=ocp.type_handlers.create_type_handler_registry(*kinds))
    registry.add("state", ocp.args.PyTreeSave, handler)
    return registry
