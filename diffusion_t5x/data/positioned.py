"""The common part of endless training batches whose position is saved."""

from collections.abc import Iterable, Mapping
from typing import Any, Self

import numpy as np

from diffusion_t5x.data import fingerprints
from diffusion_t5x.data.fingerprints import Fingerprint
from diffusion_t5x.errors import UserError


class Positioned:
    """Endless batches, and the exact position among them.

    Args:
      dataset: yields dictionaries of the arrays of a `Batch`, except example_ids.
      example_ids: int32 `[rows]`, the same for each batch.
      source: identifies the data. A position is valid only for the data that it was taken in.
      files: fingerprint of the files that are read.
    """

    def __init__(self, dataset: Iterable[Any], example_ids: np.ndarray, source: str, files: Fingerprint):
        self._iterator: Any = iter(dataset)
        self._example_ids = example_ids
        self._source = source
        self._files = files

    def __iter__(self) -> Self:
        return self

    def state(self, **position: bytes) -> dict[str, np.ndarray]:
        """Returns the position and what it is valid for, as uint8 arrays."""
        taken_in = {"source": self._source.encode(), "files": fingerprints.to_bytes(self._files)}
        return {name: np.frombuffer(value, np.uint8) for name, value in (taken_in | position).items()}

    def check_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Checks that a position was taken in these data; logs which files have changed since.

        Raises:
          UserError: it was taken in other data (task, contents, lengths, batch size, seed, shards ...).
        """
        source = bytes(state["source"]).decode()
        if source != self._source:
            raise UserError(
                f"The checkpoint's position in the data belongs to {source}, but the run reads {self._source}: resume "
                "with the same data settings, or start in a new MODEL_DIR."
            )
        fingerprints.warn_of_changes(state.get("files"), self._files)


def unreadable(reason: str) -> UserError:
    """Returns the error for training data that disappeared or broke during a run."""
    return UserError(
        f"The training data can no longer be read: {reason}. Finished checkpoints are not affected: restore the file, "
        "and the same command continues from the newest of them."
    )
