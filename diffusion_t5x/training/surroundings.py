"""Explains failures of the machine during a run: memory or disk."""

import contextlib
import errno
import math
import re
from collections.abc import Iterator
from typing import Any

import jax

from diffusion_t5x.errors import UserError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
_NO_MEMORY = "RESOURCE_EXHAUSTED"
# What TensorStore and file systems in user space say in words.
_NO_ROOM_WORDS = re.compile(r"No space left on device|Disk quota exceeded|Read-only file system|Input/output error")


@contextlib.contextmanager
def explained(state: Any, batch: str, folder: str) -> Iterator[None]:
    """Context that turns out-of-memory and disk errors into a UserError that says what to change.

    Args:
      state: tree of `jax.ShapeDtypeStruct` with shardings, which is on the devices.
      batch: description of a step's work.
      folder: folder of the run's files.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        chain = list(_chain(error))
        if words := next(filter(None, map(_no_room, chain)), None):
            raise UserError(
                f"{folder} cannot be written: {words}. Finished checkpoints are not affected. Make room there and run "
                "the same command again: it continues from the newest of them."
            ) from error
        of_memory = (str(x) for x in chain if isinstance(x, jax.errors.JaxRuntimeError) and _NO_MEMORY in str(x))
        if said := next(of_memory, None):
            line = said.partition(f"{_NO_MEMORY}: ")[2].partition("\n")[0][:200]
            raise UserError(
                f"Out of memory: {line.rstrip('.')}. Parameters and optimizer take {bytes_a_device(state) / 2**30:.2f} "
                f"GiB of each device; a step over {batch} needs more in addition. Set a smaller BATCH_SIZE, more "
                "train.train.num_microbatches or ModelConfig.remat = 'full', or shard the state over more devices with "
                "MeshConfig.fsdp."
            ) from error
        raise


def bytes_a_device(state: Any) -> int:
    """Returns the bytes per device of a tree of arrays or their shapes, with shardings."""

    def size(leaf) -> int:
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(state)))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _no_room(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        return error.strerror
    found = _NO_ROOM_WORDS.search(str(error))
    return found[0] if found else None
