"""Named random streams: draws for different purposes from one key are independent."""

import zlib
from typing import overload

import jax

from diffusion_t5x.data.batch import Array


@overload
def stream(keys: jax.Array, name: str) -> jax.Array: ...
@overload
def stream(keys: None, name: str) -> None: ...
def stream(keys: jax.Array | None, name: str) -> jax.Array | None:
    """Returns the key, or a key for each row `[B]`, for one purpose; None stays None.

    A key is either the source of named streams or is folded with numbers (steps, ids, positions), never both, so names
    and numbers cannot collide.
    """
    if keys is None:
        return None
    number = zlib.crc32(name.encode())
    return jax.random.fold_in(keys, number) if keys.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def row_keys(key: jax.Array, example_ids: Array) -> jax.Array:
    """Returns a key for each row, `[B]`, that does not depend on batch, microbatch or device."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, example_ids)
