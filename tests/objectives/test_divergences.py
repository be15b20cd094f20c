"""Divergences against float64 numpy, with gradients, and where a distribution excludes tokens."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_divergences import plain

from diffusion_t5x.objectives.divergences import Divergence, divergence

LOGITS = np.random.default_rng(0).normal(0, 3, (2, 5, 7, 12)).astype(np.float32)


@pytest.mark.parametrize("kind", get_args(Divergence))
@pytest.mark.parametrize("top_k", [None, 1, 4, 12, 50])
@pytest.mark.parametrize("mix", [0.5, 0.1])
def test_divergences(kind, top_k, mix):
    found = divergence(*LOGITS, kind, top_k, mix)
    np.testing.assert_allclose(found, plain(*LOGITS, kind, top_k, mix), rtol=2e-5, atol=2e-6)
    if top_k is not None and top_k >= 12:
        np.testing.assert_array_equal(found, divergence(*LOGITS, kind, mix=mix))


@pytest.mark.parametrize("kind", get_args(Divergence))
def test_equal_logits_are_no_distance_apart_and_others_are(kind):
    same = LOGITS[0].copy()
    same[..., 3] = -np.inf
    np.testing.assert_allclose(divergence(same, same, kind), 0, atol=1e-7)
    assert (divergence(*LOGITS, kind) > 0).all()
    assert kind != "jsd" or (divergence(*LOGITS, kind) <= np.log(2)).all()


def test_a_truncated_divergence_is_not_clamped():
    """The teacher's only likely token is likelier for the student: this term of the KL is negative."""
    teacher, student = jnp.log(jnp.array([0.6, 0.2, 0.2])), jnp.log(jnp.array([0.9, 0.01, 0.09]))
    assert divergence(teacher, student, "forward_kl", 1) == pytest.approx(0.6 * np.log(0.6 / 0.9), rel=1e-5)
    # and it may exceed the whole one
    assert divergence(student, teacher, "forward_kl", 1) > divergence(student, teacher, "forward_kl")


@pytest.mark.parametrize("kind", get_args(Divergence))
@pytest.mark.parametrize("top_k", [None, 6])
@pytest.mark.parametrize("both", [False, True])
def test_what_the_teacher_excludes_makes_no_nan_and_the_right_gradient(kind, top_k, both):
    """Excluded by the teacher alone, or by the student too, as MASK is; gradients against differences in float64."""
    teacher, student = LOGITS.astype(np.float64)[:, 0, 0]
    teacher[[2, 5, 11]] = -np.inf
    if both:
        student[[2, 5]] = -np.inf
    value, gradient = jax.value_and_grad(divergence, 1)(jnp.float32(teacher), jnp.float32(student), kind, top_k)
    assert value == pytest.approx(plain(teacher, student, kind, top_k), rel=1e-4, abs=1e-6)
    for i in range(12):
        if np.isinf(student[i]):
            assert gradient[i] == 0
            continue
        step = 1e-5 * np.eye(12)[i]
        more, less = (plain(teacher, student + sign * step, kind, top_k) for sign in (1, -1))
        assert gradient[i] == pytest.approx((more - less) / 2e-5, rel=1e-3, abs=1e-5)
