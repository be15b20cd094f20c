"""Keys and seeds of random draws."""

import jax
import numpy as np
import pytest

from diffusion_t5x.models.streams import seed_number


@pytest.mark.parametrize("seed", [0, 7, -4, 2**31, 2**32 - 1, 2**33 + 5])
def test_a_seed_given_to_a_program_draws_what_it_draws_elsewhere(seed):
    given = jax.jit(lambda seed: jax.random.key_data(jax.random.key(seed)))(seed_number(seed))
    np.testing.assert_array_equal(given, jax.random.key_data(jax.random.key(seed)))
