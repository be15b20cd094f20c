"""Schedules against their closed forms and T5X's numbers."""

import math

import jax
import numpy as np
import pytest

from diffusion_t5x.training import schedules


def test_constant():
    schedule = schedules.constant(1e-3)
    assert schedule(0) == schedule(10**6) == pytest.approx(1e-3)
    warmed_up = schedules.constant(1e-3, warmup_steps=10)
    assert [float(warmed_up(step)) for step in (0, 5, 10, 99)] == pytest.approx([0, 5e-4, 1e-3, 1e-3])


def test_linear():
    schedule = schedules.linear(1.0, total_steps=110, warmup_steps=10, end_value=0.5)
    values = [float(schedule(step)) for step in (0, 5, 10, 60, 110, 999)]
    assert values == pytest.approx([0, 0.5, 1.0, 0.75, 0.5, 0.5])
    assert float(schedules.linear(1.0, total_steps=10)(5)) == pytest.approx(0.5)


@pytest.mark.parametrize("warmup_steps", [0, 20])
def test_cosine(warmup_steps):
    schedule = schedules.cosine(2.0, total_steps=120, warmup_steps=warmup_steps, end_value=0.2)
    for step in (warmup_steps, 33, 70, 120, 500):
        progress = min((step - warmup_steps) / (120 - warmup_steps), 1)
        expected = 0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * progress))
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-6)
    if warmup_steps:
        assert [float(schedule(step)) for step in (0, 5)] == pytest.approx([0, 0.5])


def test_rsqrt_is_t5s():
    schedule = schedules.rsqrt()  # T5 1.1: 0.01 for 10,000 steps, then 1/sqrt(step)
    values = [float(schedule(step)) for step in (0, 10_000, 40_000, 1_000_000)]
    assert values == pytest.approx([0.01, 0.01, 0.005, 0.001])


def test_rsqrt_with_a_ramp():
    # T5X's "constant * linear_warmup * rsqrt_decay"
    schedule = schedules.rsqrt(2.0, warmup_steps=100, linear_warmup=True)
    assert [float(schedule(step)) for step in (0, 50, 100, 400)] == pytest.approx([0, 0.1, 0.2, 0.1])
    assert float(schedules.rsqrt(2.0, warmup_steps=0)(4)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.constant(0.1, 3),
        schedules.linear(0.1, 50, 3),
        schedules.cosine(0.1, 50, 3),
        schedules.rsqrt(1.0, 3, linear_warmup=True),
    ],
)
def test_schedules_run_under_jit(schedule):
    steps = np.arange(60)
    eager = [float(schedule(step)) for step in steps]
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(steps), eager, rtol=1e-6, atol=1e-8)
    assert min(eager) >= 0 and max(eager) <= 0.6
