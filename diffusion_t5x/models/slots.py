"""Reading and writing chosen slots of rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Int, Shaped

from diffusion_t5x.shapes import AnyBoolBL, Array


def take_slots(
    rows: Shaped[Array, "batch length *rest"], slots: Int[jax.Array, "batch some"]
) -> Shaped[jax.Array, "batch some *rest"]:
    """Returns the values in each row's own slots; 0 for slots beyond the end."""
    return jnp.asarray(rows).at[jnp.arange(len(rows))[:, None], slots].get(mode="fill", fill_value=0)


def put_slots(
    rows: Shaped[Array, "batch length *rest"],
    slots: Int[jax.Array, "batch some"],
    values: Shaped[Array, "batch some *rest"],
) -> Shaped[jax.Array, "batch length *rest"]:
    """Returns the rows with values in each row's own slots; values for slots beyond the end are dropped."""
    return jnp.asarray(rows).at[jnp.arange(len(rows))[:, None], slots].set(values, mode="drop")


def slots_where(mask: AnyBoolBL, most: int) -> Int[jax.Array, "batch {most}"]:
    """Returns the slots where the mask is True, at most the first `most` of each row; L where there are fewer."""
    length = mask.shape[1]
    return jnp.sort(jnp.where(mask, jnp.arange(length), length), axis=-1)[:, :most]
