"""Reductions by group, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_t5x.decoding.groups import Groups


def test_the_largest_value_of_each_group_and_its_place():
    rng = np.random.default_rng(0)
    group_of = rng.choice([-1, 0, 1, 2, 3], 400, p=[0.2, 0.68, 0.1, 0.01, 0.01])  # more than 16 * 16 in one
    group_of[:5] = [3, 2, -1, 1, 0]
    values = rng.integers(-4, 4, (3, 400)).astype(np.float32)  # with equals
    values[0, group_of == 1] = -np.inf
    groups = Groups.of(group_of, 4)
    assert len(groups.levels) == 3
    largest, places = jax.jit(groups.largest)(jnp.asarray(values))
    for row, of_row in enumerate(values):
        for group in range(4):
            (members,) = np.nonzero(group_of == group)
            assert largest[row, group] == of_row[members].max()
            assert places[row, group] == members[of_row[members].argmax()]
    np.testing.assert_array_equal(jax.jit(lambda x: groups.reduce(x, jnp.max))(values), largest)
