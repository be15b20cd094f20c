"""Sampling filters against loops, and frequencies against probabilities."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_t5x.errors import UserError
from diffusion_t5x.models.sampling import Sampling, filter_logits, forbid, is_likeliest, likeliest, sample


def softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def kept_by_loop(logits, sampling):
    """The ids that may be drawn, from the definitions of top-k and top-p."""
    logits = logits.astype(np.float64) / sampling.temperature
    kept = set(range(len(logits)))
    if sampling.top_k is not None:
        least = sorted(logits)[-min(sampling.top_k, len(logits))]
        kept = {i for i in kept if logits[i] >= least}
    if sampling.top_p is not None and sampling.top_p < 1:
        inside = sorted(kept)
        probabilities = dict(zip(inside, softmax(logits[inside]), strict=True))
        total, nucleus = 0.0, []
        for i in sorted(inside, key=lambda i: -logits[i]):
            if total >= sampling.top_p:
                break
            total += probabilities[i]
            nucleus.append(i)
        kept = {i for i in kept if logits[i] >= min(logits[nucleus])}
    return kept


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    # Coarse numbers: ties are common, and rounding never decides where top-p ends.
    st.lists(st.integers(-8, 8).map(lambda x: x / 2), min_size=9, max_size=9),
    st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    st.none() | st.integers(1, 12),
    st.none() | st.integers(1, 64).map(lambda n: n / 64),
)
def test_filters_keep_what_their_definitions_say(logits, temperature, top_k, top_p):
    sampling = Sampling(temperature, top_k, top_p)
    logits = np.array(logits, np.float32)
    expected = kept_by_loop(logits, sampling)
    filtered = np.asarray(filter_logits(jnp.asarray(logits), sampling))
    assert set(np.flatnonzero(np.isfinite(filtered))) == expected
    np.testing.assert_allclose(
        filtered[sorted(expected)], logits[sorted(expected)] / np.float32(temperature), rtol=1e-6
    )


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.5), Sampling(1.0, top_k=3), Sampling(2.0, top_p=0.6)])
def test_tokens_come_as_often_as_their_probability(sampling):
    draws = 20_000
    logits = np.array([2.0, -1.0, 0.5, 1.0, 0.0], np.float32)
    kept = np.isin(np.arange(5), list(kept_by_loop(logits, sampling)))
    expected = np.where(kept, np.exp(logits / sampling.temperature), 0)
    expected /= expected.sum()
    tokens = sample(
        jnp.broadcast_to(logits, (1, draws, 5)),
        jax.random.split(jax.random.key(0), 1),
        jnp.arange(draws)[None],
        sampling,
    )
    frequency = np.bincount(np.asarray(tokens[0]), minlength=5) / draws
    assert (np.abs(frequency - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws)).all()


def test_temperature_zero_takes_the_likeliest():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 7))
    tokens = sample(logits, jax.random.split(jax.random.key(1), 2), jnp.zeros((2, 3), jnp.int32), Sampling(0.0))
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))


def test_the_likeliest_is_the_first_of_equals_in_any_shape():
    logits = np.random.default_rng(0).integers(-3, 3, (4, 5, 9)).astype(np.float32)
    logits[0, 0] = -np.inf  # nothing may be written
    logits[0, 1, :8] = -np.inf
    for got in (likeliest(logits), jax.jit(likeliest)(logits), jax.vmap(likeliest)(logits)):
        np.testing.assert_array_equal(got, np.argmax(logits, axis=-1))
        assert got.dtype == jnp.int32
    for ids in np.random.default_rng(1).integers(0, 9, (3, 4, 5)):
        at = np.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        np.testing.assert_array_equal(is_likeliest(logits, ids), at == logits.max(axis=-1))


def test_a_draw_depends_on_its_row_and_position_alone():
    logits, positions = jnp.zeros((3, 8, 1000)), jnp.broadcast_to(jnp.arange(8), (3, 8))
    keys = jax.random.split(jax.random.key(0), 3)
    whole = sample(logits, keys, positions, Sampling())
    np.testing.assert_array_equal(sample(logits[1:, :5], keys[1:], positions[1:, :5], Sampling()), whole[1:, :5])
    np.testing.assert_array_equal(sample(logits[:1, 2:], keys[:1], positions[:1, 2:], Sampling()), whole[:1, 2:])
    assert len(np.unique(whole)) > 20  # 24 draws out of 1000


def test_mask_and_rows_that_mean_nothing_cannot_be_written():
    logits = np.asarray(forbid(jnp.ones((1, 2, 32)), tiny.VOCABULARY))
    assert (np.isneginf(logits) == np.isin(np.arange(32), [23, *range(24, 32)])).all()
    logits = np.asarray(forbid(jnp.ones((1, 2, 32)), tiny.VOCABULARY.for_infilling()))
    assert (np.isneginf(logits) == ~np.isin(np.arange(32), range(*tiny.PIECES))).all()


def test_the_most_likely_token_is_kept_however_small_the_settings_are():
    logits = jnp.array([1e4, 0.0, -1e4])
    for sampling in (Sampling(1.0, top_p=1e-300), Sampling(1e-6), Sampling(1e-6, top_p=1e-300)):
        filtered = filter_logits(logits, sampling)
        assert jnp.argmax(jax.nn.softmax(filtered)) == 0 and jnp.isfinite(filtered[0])


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": 1e-7},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(UserError):
        Sampling(**bad)
