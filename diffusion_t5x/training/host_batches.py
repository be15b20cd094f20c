"""Training data for one of several processes, with a position for all of them."""

import io
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.errors import UserError
from diffusion_t5x.training.loop import BatchIterator
from diffusion_t5x.training.state import TrainState

logger = logging.getLogger(__name__)


class HostBatches:
    """One process's rows of endless batches, and the position of the data as a whole.

    Data are read in as many shards as there were shares when the run began. Their number does not change, so a run that
    continues on other processes takes the same examples at the same steps: each process reads the shards of its rows.

    Args:
      open_shard: `(num_shards, shard_index) -> BatchIterator`, batches of `batch_size / num_shards` rows.
      batch_size: number of rows in the batch of all shards together.
      share: index of this process's share, and number of shares; see `partitioning.share_of_rows`.
    """

    def __init__(
        self, open_shard: Callable[[int, int], BatchIterator], batch_size: int, share: tuple[int, int] = (0, 1)
    ):
        self._open_shard, self._batch_size = open_shard, batch_size
        self._share, self._num_shares = share
        self._open(self._num_shares)

    def _open(self, num_shards: int) -> None:
        if self._batch_size % num_shards:
            raise UserError(f"The batch size {self._batch_size} does not divide into {num_shards} shards of the data.")
        rows = self._batch_size // self._num_shares
        shard_rows = self._batch_size // num_shards
        start, stop = self._share * rows, (self._share + 1) * rows
        numbers = range(start // shard_rows, -(-stop // shard_rows))
        self._num_shards = num_shards
        self._shards = {number: self._open_shard(num_shards, number) for number in numbers}
        self._rows = slice(start - numbers[0] * shard_rows, stop - numbers[0] * shard_rows)

    def __next__(self) -> Batch:
        parts = [next(shard) for shard in self._shards.values()]
        return jax.tree.map(lambda *x: np.concatenate(x)[self._rows], *parts)

    def next_batch(self, state: TrainState) -> Batch:
        """Returns the next batch, independent of the state."""
        return next(self)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Returns the positions of all shards, also those of other processes: all must call it at the same time.

        {} if the data have no position that can be saved.
        """
        positions = {
            f"shard_{number}_{name}": x
            for number, shard in self._shards.items()
            for name, x in shard.state_dict().items()
        }
        gathered = _of_all_processes(positions)
        return {"num_shards": np.int32(self._num_shards)} | gathered if gathered else {}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Restores the position that `state_dict` returned, for any share; {} stays at the beginning.

        Raises:
          UserError: the position belongs to other data.
        """
        if not state:
            logger.info("the checkpoint has no position in the training data: these start over, so examples may repeat")
            return
        if "num_shards" not in state:
            raise UserError("The checkpoint's data position has a format that is no longer supported: start a new run.")
        if (num_shards := int(state["num_shards"])) != self._num_shards:
            self._open(num_shards)
        for number, shard in self._shards.items():
            prefix = f"shard_{number}_"
            shard.load_state_dict(
                {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
            )


def _of_all_processes(arrays: dict[str, Any]) -> dict[str, Any]:
    """Merges the arrays of all processes by name; equal names mean equal arrays."""
    if jax.process_count() == 1:
        return arrays
    file = io.BytesIO()
    np.savez(file, **arrays)
    own = np.frombuffer(file.getvalue(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    files = multihost_utils.process_allgather(np.pad(own, (0, sizes.max() - len(own))))
    gathered: dict[str, Any] = {}
    for size, padded in zip(sizes, files, strict=True):
        with np.load(io.BytesIO(padded[:size].tobytes()), allow_pickle=False) as found:
            gathered |= dict(found)
    return gathered
