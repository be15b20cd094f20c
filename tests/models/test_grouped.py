"""Products of groups of rows, and a TPU's kernel for their gradients, interpreted here, against a loop over groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from diffusion_t5x.models import grouped

SIZES = (11, 0, 20)  # of 40 rows: a group without rows, and rows without a group


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_gradients_are_those_of_each_group_by_itself(platform, monkeypatch):
    monkeypatch.setattr(grouped, "platform", lambda: platform)
    rng = np.random.default_rng(0)
    x, kernel, toward = (rng.standard_normal(shape).astype(np.float32) for shape in ((40, 8), (3, 8, 6), (40, 6)))
    with pltpu.force_tpu_interpret_mode(platform == "tpu"):
        found, back = jax.vjp(lambda *args: grouped.grouped(*args, jnp.asarray(SIZES)), x, kernel)
        of_x, of_kernel = back(toward)
    start = 0
    for group, size in enumerate(SIZES):
        rows = slice(start, start := start + size)
        np.testing.assert_allclose(found[rows], x[rows] @ kernel[group], atol=1e-5)
        np.testing.assert_allclose(of_x[rows], toward[rows] @ kernel[group].T, atol=1e-5)
        np.testing.assert_allclose(of_kernel[group], x[rows].T @ toward[rows], atol=1e-5)
