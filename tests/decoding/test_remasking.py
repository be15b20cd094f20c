"""ReMDM: chances worked out by hand, one step by NumPy, and the shares and tokens that come of many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from diffusion_t5x.decoding.canvas import Canvas
from diffusion_t5x.decoding.remasking import RemaskingDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.sampling import uniform
from diffusion_t5x.models.streams import stream

MASK = tiny.VOCABULARY.mask_id
LOOP = (0.5, 0.25, 0.8)


@pytest.mark.parametrize(
    ("decoder", "sigma", "stays"),
    [
        # Written: 0, 1/4, 1/2, 3/4, 1. The most that may be masked: 1, 1 (of 2), 1/2, 0.
        (RemaskingDecoder(4, eta=0.0), [0, 0, 0, 0], [3 / 4, 2 / 3, 1 / 2, 0]),
        (RemaskingDecoder(4, eta=0.6), [0.6, 0.6, 0.5, 0], [3 / 4, (0.5 - 0.15) / 0.75, (0.25 - 0.25) / 0.5, 0]),
        (RemaskingDecoder(4, "rescaled", 0.4), [0.4, 0.4, 0.2, 0], [3 / 4, (0.5 - 0.1) / 0.75, (0.25 - 0.1) / 0.5, 0]),
        (RemaskingDecoder(4, eta=0.6, by_confidence=True), [0.6, 0.6, 0.5, 0], [3 / 4, 2 / 3, 1 / 2, 0]),
        # Written: 0, 0.4, 0.8, 0.8, 1. On the plateau at most 0.2 / 0.8 of the written ones may be masked.
        (RemaskingDecoder(4, eta=0.1, loop=LOOP), [0, 0, 0.1, 0], [0.6, 0.2 / 0.6, (0.2 - 0.08) / 0.2, 0]),
        (RemaskingDecoder(4, "rescaled", 1.0, LOOP), [0, 0, 0.25, 0], [0.6, 0.2 / 0.6, 0, 0]),
    ],
    ids=str,
)
def test_the_chances_of_each_step(decoder, sigma, stays):
    found = decoder.chances()
    np.testing.assert_allclose(found[0], sigma, atol=1e-12)
    np.testing.assert_allclose(found[1], stays, atol=1e-12)


@pytest.mark.parametrize("by_confidence", [False, True])
def test_a_step_by_hand(by_confidence):
    """In the third step of four, of a row whose first four targets are written, with these probabilities."""
    decoder = RemaskingDecoder(4, eta=0.5, by_confidence=by_confidence, temperature=0.0)
    sure, rows = np.array([0.9, 0.5, 0.2, 0.99], np.float32), 200
    tokens = np.tile(np.array([5, 6, 7, 8, MASK, MASK, MASK, MASK, 9], np.int32), (rows, 1))
    positions = np.tile(np.arange(9, dtype=np.int32), (rows, 1))
    targets, keys = positions < 8, jax.random.split(jax.random.key(0), rows)
    logits = np.log(np.where(np.arange(32) == 3, 0.6, 0.01)).astype(np.float32)
    model = tiny.TableModel(np.zeros((32, 32), np.float32))

    @jax.jit
    def step(keys):
        canvas = Canvas.start(jnp.asarray(tokens), jnp.asarray(targets))
        log_probability = jnp.broadcast_to(jnp.log(jnp.asarray([*sure, 1, 1, 1, 1, 1])), tokens.shape)
        canvas = canvas.replace(step=canvas.step + 2, log_probability=log_probability)
        hidden = jnp.broadcast_to(logits, (*tokens.shape, 32))
        written = decoder.write(model, hidden, canvas, canvas.target_mask, jnp.asarray(positions), keys)
        return written, uniform(stream(keys, "remasking"), positions)

    written, drawn = jax.device_get(step(keys))
    chance = 0.5 * np.exp(-sure) / np.exp(-sure).sum() if by_confidence else np.full(4, 0.5)
    stays = 0.25 / 0.5 if by_confidence else (0.25 - 0.5 * 0.5) / 0.5
    expected = tokens.copy()
    expected[:, :4] = np.where(drawn[:, :4] < chance, MASK, expected[:, :4])
    expected[:, 4:8] = np.where(drawn[:, 4:8] < stays, MASK, 3)
    np.testing.assert_array_equal(written.tokens, expected)
    np.testing.assert_array_equal(written.mask, expected != tokens)
    of_three = np.log(0.6 / (0.6 + 22 * 0.01))
    gained = of_three * (expected[:, 4:8] == 3).sum(1) - (np.log(sure) * (expected[:, :4] == MASK)).sum(1)
    np.testing.assert_allclose(written.score, gained, rtol=1e-4, atol=1e-5)
    assert (expected[:, :4] == MASK).any() and (expected[:, 4:8] == 3).any()


def test_a_loop_keeps_its_share_written_and_writes_as_the_model_says():
    """A table whose row of MASK gives different probabilities to three pieces, whatever stands elsewhere."""
    rows, targets, steps = 64, 32, 10
    batch = tiny.one_a_row([([5], [0] * targets)] * rows)
    wanted = np.array([0.5, 0.3, 0.2])
    table = jnp.full((32, 32), -1e9).at[MASK, 3:6].set(jnp.log(wanted))
    decoder = RemaskingDecoder(steps, eta=0.3, loop=(0.6, 0.2, 0.7))
    run = jax.jit(lambda key: decoder.decode(tiny.TableModel(table), batch, key, trace=True))
    decoded = jax.device_get(run(jax.random.key(0)))
    share = np.interp(np.arange(steps + 1) / steps, [0, 0.4, 0.8, 1], [0, 0.7, 0.7, 1])
    tokens = decoded.trace.tokens[:, :, 1:]
    error = 5 * np.sqrt(share * (1 - share) / (rows * targets))
    assert (np.abs((tokens != MASK).mean(axis=(1, 2)) - share) <= error + 1e-9).all()
    for step in range(1, steps):
        written = tokens[step] != MASK
        taken_back = (tokens[step + 1] == MASK)[written].mean()
        sigma = 0.3 if 4 <= step < 8 else 0.0
        assert abs(taken_back - sigma) <= 5 * np.sqrt(sigma * (1 - sigma) / written.sum())
    found = np.bincount(decoded.tokens[:, 1:].ravel(), minlength=32)[3:6] / (rows * targets)
    assert found.sum() == 1 and (np.abs(found - wanted) <= 5 * np.sqrt(wanted * (1 - wanted) / (rows * targets))).all()
    log_probabilities = np.log(wanted)[decoded.tokens[:, 1:] - 3]  # taken back, a token's is taken back as well
    np.testing.assert_allclose(decoded.scores, log_probabilities.mean(axis=1), rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_steps": 0}, "num_steps of at least 1"),
        ({"eta": 1.5}, r"eta in \[0, 1\]"),
        ({"loop": (0.2, 0.5, 0.9)}, "0 < end <= start < 1"),
        ({"loop": (0.5, 0.2, 1.0)}, "0 < written < 1"),
        ({"loop": (0.5, 0.2)}, "must be .start, end, written."),
        ({"schedule": "linear"}, "schedule"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        RemaskingDecoder(**wrong)
