"""ReMDM's marginals: the share of masked targets after each step is the schedule's, however much is taken back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from my_remasking import RemaskingDecoder

from diffusion_t5x.errors import UserError

ROWS, TARGETS, STEPS = 64, 32, 8
BATCH = tiny.one_a_row([([5], [0] * TARGETS)] * ROWS)
MASK = tiny.VOCABULARY.mask_id
TABLE = jnp.asarray(np.random.default_rng(0).standard_normal((32, 32)), jnp.float32)


@pytest.mark.parametrize("cap", [0.0, 0.1, 1.0])
def test_the_share_of_masked_targets_is_the_schedule_s(cap):
    decoder = RemaskingDecoder(num_steps=STEPS, cap=cap)
    decode = jax.jit(lambda key: decoder.decode(tiny.TableModel(TABLE), BATCH, key, trace=True))
    tokens = np.asarray(decode(jax.random.key(0)).trace.tokens)[:, :, 1:]
    masked = tokens == MASK
    share = np.linspace(1, 0, STEPS + 1)
    error = np.sqrt(share * (1 - share) / (ROWS * TARGETS))
    assert (np.abs(masked.mean(axis=(1, 2)) - share) <= 5 * error).all()
    # A step from share 1 - a to 1 - b takes back each written token with probability sigma.
    for step in range(1, STEPS):
        sigma = min(cap, (STEPS - step - 1) / step)
        written = ~masked[step]
        taken_back = (masked[step + 1] & written).sum() / written.sum()
        assert abs(taken_back - sigma) <= 5 * np.sqrt(sigma * (1 - sigma) / written.sum())


def test_what_is_written_is_drawn_as_the_model_says():
    """A table whose row of MASK gives a fifth of the probability to each of five pieces."""
    table = jnp.full((32, 32), -1e9).at[MASK, 3:8].set(0.0)
    decoder = RemaskingDecoder(num_steps=STEPS, cap=0.5)
    decoded = jax.jit(lambda key: decoder.decode(tiny.TableModel(table), BATCH, key))(jax.random.key(1))
    written = np.asarray(decoded.tokens)[:, 1:]
    counts = np.bincount(written.ravel(), minlength=32)
    assert counts[3:8].sum() == written.size
    assert (np.abs(counts[3:8] / written.size - 0.2) <= 5 * np.sqrt(0.2 * 0.8 / written.size)).all()
    np.testing.assert_allclose(decoded.scores, np.log(0.2), rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"cap": -0.1}, {"cap": 1.5}, {"temperature": -1.0}])
def test_mistakes(wrong):
    with pytest.raises(UserError):
        RemaskingDecoder(**wrong)
