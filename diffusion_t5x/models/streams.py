"""Named random streams: draws for different purposes from one key are independent."""

import operator
import zlib
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Key

from diffusion_t5x.shapes import Array, IntScalar, KeyB, KeyScalar


@overload
def stream(keys: Key[jax.Array, "*rows"], name: str) -> Key[jax.Array, "*rows"]: ...
@overload
def stream(keys: None, name: str) -> None: ...
def stream(keys: Key[jax.Array, "*rows"] | None, name: str) -> Key[jax.Array, "*rows"] | None:
    """Returns the key, or a key for each row, for one purpose; None stays None.

    A key is either the source of named streams or is folded with numbers (steps, ids, positions), never both, so names
    and numbers cannot collide.
    """
    if keys is None:
        return None
    number = zlib.crc32(name.encode())
    return jax.random.fold_in(keys, number) if keys.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def row_keys(key: KeyScalar | KeyB, example_ids: Int[Array, " batch"]) -> KeyB:
    """Returns a key for each row that does not depend on batch, microbatch or device.

    Args:
      key: the key of all rows, or one for each.
      example_ids: folded in.
    """
    return jax.vmap(jax.random.fold_in, (None if key.ndim == 0 else 0, 0))(key, example_ids)


def sample_key(key: KeyScalar, sample: IntScalar | int) -> KeyScalar:
    """Returns the key of an example's sample of this number; the 0th has the key itself."""
    # Rows fold in their ids, which are not negative: no sample's key is a row's.
    return jnp.where(jnp.equal(sample, 0), key, jax.random.fold_in(key, -sample))


def seed_number(seed: int) -> np.uint32:
    """Returns a seed as an argument of a program: `jax.random.key` takes any integer modulo 2**32."""
    return np.uint32(operator.index(seed) % 2**32)
