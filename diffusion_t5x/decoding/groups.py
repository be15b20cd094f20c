"""Reductions by group along the last axis of an array."""

import dataclasses
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

_WIDTH = 16  # members that are reduced at once


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """Disjoint groups of the places of an axis. Each level gathers rows of places and reduces them.

    Gathers of a fixed width become vector code where XLA's scatter, and so `jax.ops.segment_max`, is a loop.

    Attributes:
      levels: the places to gather, int32 `[rows, width]`, -1 for none. The rows of the last level are the groups.
    """

    levels: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, group_of: Int[np.ndarray, " places"], number: int) -> Self:
        """Returns `number` groups, none of them empty, from each place's group; -1 is in none."""
        places = np.argsort(group_of, kind="stable")
        places = places[group_of[places] >= 0]
        groups = group_of[places]
        levels: list[np.ndarray] = []
        while not levels or len(groups) > number:
            sizes = np.bincount(groups, minlength=number)
            assert sizes.min() > 0, "an empty group"
            within = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            num_rows = -(-sizes // _WIDTH)
            row = (np.cumsum(num_rows) - num_rows)[groups] + within // _WIDTH
            level = np.full((num_rows.sum(), _WIDTH), -1, np.int32)
            level[row, within % _WIDTH] = places
            levels.append(level[:, : sizes.max()])
            groups = np.repeat(np.arange(number), num_rows)
            places = np.arange(len(groups))
        return cls(tuple(levels))

    def reduce(
        self, values: Float[jax.Array, "*shape places"], how: Callable[..., jax.Array]
    ) -> Float[jax.Array, "*shape groups"]:
        """Reduces by `how`, a function of an array and an axis that -inf does not affect, such as `jnp.max`."""
        for level in self.levels:
            values = how(_take(values, level), axis=-1)
        return values

    def largest(
        self, values: Float[jax.Array, "*shape places"]
    ) -> tuple[Float[jax.Array, "*shape groups"], Int[jax.Array, "*shape groups"]]:
        """Returns the largest value of each group, and its place; of equals, the first."""
        places: jax.Array | None = None
        for level in self.levels:
            column = jnp.argmax(_take(values, level), axis=-1)
            # Of the level's constants, not of an array as large as what was taken: that is four times slower on CPU.
            at = jnp.asarray(level.ravel())[column + np.arange(len(level)) * level.shape[1]]
            values = jnp.take_along_axis(values, at, axis=-1)
            places = at if places is None else jnp.take_along_axis(places, at, axis=-1)
        assert places is not None, "there is a level"
        return values, places


def _take(values: Float[jax.Array, "*shape places"], level: np.ndarray) -> Float[jax.Array, "*shape rows width"]:
    return jnp.where(level >= 0, values[..., level], -jnp.inf)
