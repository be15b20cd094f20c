"""Learning-rate schedules: small factories of `optax.Schedule`, functions of the 0-based step.

Every schedule takes `warmup_steps`; schedules that know the total number of steps also take a share: 0.05 of 1,000
steps are 50. Except in T5's `rsqrt`, warm-up is a linear ramp from 0 at step 0 to the peak at step `warmup_steps`.
"""

import jax.numpy as jnp
import optax

from diffusion_t5x.errors import UserError


def constant(value: float, warmup_steps: int = 0) -> optax.Schedule:
    """Returns a schedule that stays at `value` after the warm-up."""
    _check(value, warmup_steps)
    return _warmed_up(optax.constant_schedule(value), value, warmup_steps)


def linear(
    peak_value: float, total_steps: int, warmup_steps: int | float = 0, end_value: float = 0.0
) -> optax.Schedule:
    """Returns a linear schedule from `peak_value` after the warm-up to `end_value` at `total_steps`, then constant."""
    _check(peak_value, warmup_steps)
    warmup_steps = _warmup(total_steps, warmup_steps)
    decay = optax.linear_schedule(peak_value, end_value, total_steps - warmup_steps)
    return _warmed_up(decay, peak_value, warmup_steps)


def cosine(
    peak_value: float, total_steps: int, warmup_steps: int | float = 0, end_value: float = 0.0
) -> optax.Schedule:
    """Returns half a cosine from `peak_value` after the warm-up to `end_value` at `total_steps`, then constant.

    Args:
      peak_value: the highest learning rate, at the end of the warm-up.
      total_steps: number of steps until the rate reaches `end_value`.
      warmup_steps: number of steps over which the rate rises from 0 to its peak; a float below 1 is a share of
        `total_steps`.
      end_value: the rate from `total_steps` on.
    """
    _check(peak_value, warmup_steps)
    warmup_steps = _warmup(total_steps, warmup_steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup_steps else peak_value,
        peak_value=peak_value,
        warmup_steps=warmup_steps,
        decay_steps=total_steps,
        end_value=end_value,
    )


def rsqrt(
    value: float = 1.0, warmup_steps: int = 10_000, linear_warmup: bool = False, peak_value: float | None = None
) -> optax.Schedule:
    """Returns `value / sqrt(max(step, warmup_steps))`: T5's pretraining schedule, made for Adafactor.

    It is T5X's `factors="constant * rsqrt_decay"`: the warm-up is a plateau, at `value / sqrt(warmup_steps)` (0.01 with
    the defaults), not a ramp. `linear_warmup` multiplies a ramp into it (T5X's factor of that name), which Adam needs.
    `peak_value` sets the rate at the end of the warm-up instead of `value`.
    """
    _check(value if peak_value is None else peak_value, warmup_steps)
    if peak_value is not None:
        value = peak_value * max(warmup_steps, 1) ** 0.5

    def schedule(step):
        decay = value / jnp.sqrt(jnp.maximum(step, max(warmup_steps, 1)))
        return decay * jnp.minimum(1.0, step / max(warmup_steps, 1)) if linear_warmup else decay

    return schedule


def _check(rate: float, warmup_steps: int | float) -> None:
    if rate < 0:
        raise UserError(f"A learning rate cannot be below 0: {rate}. Set LEARNING_RATE.")
    if warmup_steps < 0:
        raise UserError(f"A warm-up cannot take {warmup_steps} steps. Set WARMUP_STEPS to 0 or more.")


def _warmup(total_steps: int, warmup_steps: int | float) -> int:
    """Returns the number of warm-up steps; a share is converted."""
    steps = round(warmup_steps * total_steps) if 0 < warmup_steps < 1 else warmup_steps
    if steps != int(steps) or not 0 <= steps < max(total_steps, 1):
        raise UserError(
            f"A schedule of {total_steps} steps cannot warm up for {warmup_steps}. Set WARMUP_STEPS to a whole number "
            f"below {total_steps}, or to a fraction of the steps such as 0.05."
        )
    return int(steps)


def _warmed_up(schedule: optax.Schedule, peak_value: float, warmup_steps: int) -> optax.Schedule:
    if not warmup_steps:
        return schedule
    return optax.join_schedules([optax.linear_schedule(0.0, peak_value, warmup_steps), schedule], [warmup_steps])
