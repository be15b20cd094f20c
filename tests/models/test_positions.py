"""Relative position buckets against T5's numbers and exact arithmetic; rotary positions against complex numbers."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_t5x.models.positions import (
    LearnedPositions,
    RelativePositionBias,
    relative_position_bucket,
    rotary_frequencies,
    rotate,
)

DISTANCES = [-128, -64, -16, -8, -1, 0, 1, 8, 64, 128]
T5_BIDIRECTIONAL = [15, 14, 10, 8, 1, 0, 17, 24, 30, 31]
T5_CAUSAL = [31, 26, 16, 8, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("compile", [lambda f: f, jax.jit])
@pytest.mark.parametrize("bidirectional,expected", [(True, T5_BIDIRECTIONAL), (False, T5_CAUSAL)])
def test_buckets_are_t5s(compile, bidirectional, expected):
    bucket = compile(lambda r: relative_position_bucket(r, bidirectional=bidirectional))
    assert bucket(jnp.array(DISTANCES)).tolist() == expected


def exact_bucket(relative_position, bidirectional, num_buckets, max_distance):
    """T5's definition in rational numbers: no rounding at the borders of the logarithmic buckets."""
    offset, distance = 0, max(0, -relative_position)
    if bidirectional:
        num_buckets //= 2
        offset, distance = num_buckets * (relative_position > 0), abs(relative_position)
    exact = num_buckets // 2
    if distance < exact:
        return offset + distance
    # floor(log(distance / exact) / log(max_distance / exact) * logarithmic) without a logarithm
    logarithmic, bucket = num_buckets - exact, 0
    while exact + bucket + 1 < num_buckets and Fraction(distance, exact) ** logarithmic >= Fraction(
        max_distance, exact
    ) ** (bucket + 1):
        bucket += 1
    return offset + exact + bucket


@pytest.mark.parametrize("compile", [lambda f: f, jax.jit])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets,max_distance", [(32, 128), (16, 64), (8, 20), (4, 8)])
def test_every_distance_falls_into_its_bucket(compile, bidirectional, num_buckets, max_distance):
    settings = {"bidirectional": bidirectional, "num_buckets": num_buckets, "max_distance": max_distance}
    distances = np.arange(-300, 301)
    found = compile(lambda r: relative_position_bucket(r, **settings))(jnp.asarray(distances))
    assert found.tolist() == [exact_bucket(r, **settings) for r in distances.tolist()]


def test_bias_is_looked_up_by_key_minus_query():
    bias = RelativePositionBias(jax.random.key(0), num_heads=3, num_buckets=32, max_distance=128)
    table = np.asarray(bias.embedding.get_value())
    found = bias(jnp.array([[5, 9]]), jnp.array([[5, 6, 1]]))
    assert found.shape == (1, 3, 2, 3)
    for query, row in ((5, 0), (9, 1)):
        for key, column in ((5, 0), (6, 1), (1, 2)):
            np.testing.assert_array_equal(found[0, :, row, column], table[exact_bucket(key - query, True, 32, 128)])


def test_causal_buckets_are_t5s_own():
    bias = RelativePositionBias(jax.random.key(0), 3, 32, 128, causal_buckets=True)
    table = np.asarray(bias.embedding.get_value())
    found = bias(jnp.array([[200]]), 200 + jnp.array([DISTANCES]))
    np.testing.assert_array_equal(found[0, :, 0], table[np.array(T5_CAUSAL)].T)


def test_learned_positions_are_added_and_end_with_the_last():
    learned = LearnedPositions(jax.random.key(0), 7, 4)
    table, x = np.asarray(learned.embedding.get_value()), np.ones((2, 3, 4), np.float32)
    found = learned(x, jnp.array([[0, 6, 1], [5, 0, 7]]))
    np.testing.assert_array_equal(found, 1 + table[[[0, 6, 1], [5, 0, 6]]])
    assert np.var(table) == pytest.approx(1, abs=5 * np.sqrt(2 / table.size))  # five standard errors


def test_rotation_multiplies_by_a_complex_phase():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 3, 8)).astype(np.float32)
    positions = rng.integers(0, 1000, (2, 5))
    pairs = x[..., :4] + 1j * x[..., 4:]
    turned = pairs * np.exp(1j * positions[..., None, None] * 100.0 ** (-2 * np.arange(4) / 8))
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    found = rotate(x, positions, rotary_frequencies(8, 100.0))
    np.testing.assert_allclose(found, expected, atol=2e-4)  # float32 angles up to 1000


def test_rotary_scores_depend_on_the_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(query_position, key_position):
        frequency = rotary_frequencies(16, 10_000.0)
        at = [rotate(x, jnp.full((1, 1), p), frequency) for x, p in ((query, query_position), (key, key_position))]
        return float(jnp.sum(at[0] * at[1]))

    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)


def test_stretched_wavelengths_are_llamas():
    """Below the first wavelength nothing changes, beyond the second all is `factor` times as long."""
    plain = rotary_frequencies(64, 500_000.0)
    np.testing.assert_allclose(rotary_frequencies(64, 500_000.0, 4.0), plain / 4, rtol=1e-6)
    ratio = plain / rotary_frequencies(64, 500_000.0, 8.0, (2048.0, 8192.0))
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(ratio[wavelength < 2048], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[wavelength > 8192], 8, rtol=1e-6)
    between = ratio[(wavelength > 2048) & (wavelength < 8192)]
    assert len(between) and (between > 1).all() and (between < 8).all() and (np.diff(ratio) >= -1e-6).all()
