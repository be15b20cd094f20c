"""The number of tokens that each step of masked decoding writes."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from diffusion_t5x.shapes import IntB, IntScalar

Counts = Literal["even", "index", "times", "linear"]


def counts_table(kind: Counts, most: int, num_steps: int) -> Int[np.ndarray, "{most}+1 steps"]:
    """Returns the number of tokens that each step writes, for any number of masked ones, without empty steps.

    Args:
      kind: "times" are Dream's counts (arXiv 2508.15487): int(n (1 - s / t)) of n masked tokens in the step from time t
        to s, of evenly spaced times from 1 to 0.001, in float32. "linear" are dllm's: n (1 - s / t) with times from 1
        to 0, rounded half to even, of a ratio in float32.
      most: largest number of masked tokens.
      num_steps: number of steps, including empty ones.
    """
    left = np.arange(most + 1)
    counts = np.zeros((most + 1, num_steps), np.int32)
    for step, share in enumerate(unmasked_shares(num_steps) if kind == "times" else _linear_shares(num_steps)):
        if step == num_steps - 1:
            count = left
        elif kind == "times":
            count = (left.astype(np.float32) * share).astype(np.int64)
        else:
            count = np.minimum(np.rint(left * share).astype(np.int64), left)
        counts[:, step] = count
        left = left - count
    order = np.argsort(counts == 0, axis=1, kind="stable")
    return np.take_along_axis(counts, order, axis=1)[:, : min(num_steps, max(most, 1))]


def unmasked_shares(num_steps: int) -> Float[np.ndarray, " {num_steps}"]:
    """Returns Dream's share of masked tokens that each step unmasks: 1 - s / t, and all in the last step."""
    number = np.arange(num_steps + 1, dtype=np.float32)
    first, last = np.float32(1), np.float32(1e-3)
    step = (last - first) / np.float32(num_steps)
    # As torch.linspace rounds: from both ends.
    times = np.where(number < (num_steps + 1) // 2, first + step * number, last - step * (num_steps - number))
    shares = 1 - times[1:] / times[:-1]
    shares[-1] = 1
    return shares.astype(np.float32)


def _linear_shares(num_steps: int) -> Float[np.ndarray, " {num_steps}"]:
    times = (np.arange(num_steps, -1, -1) / num_steps).astype(np.float32)
    masked = 1 - (1 - times)
    return 1 - (masked[1:] / masked[:-1]).astype(np.float64)


def step_count(
    kind: Counts, num_steps: int | None, most: int, total: IntB, left: IntB, taken: IntB | IntScalar
) -> IntB:
    """Returns the number of tokens that the next step writes in each row.

    Args:
      kind: "even": the remaining tokens divided by the remaining steps, rounded up, so that steps differ by at most one
        token. "index": a share of `most`, whatever is left (SDAR). For others, see `counts_table`.
      num_steps: total number of steps; None writes one token per step.
      most: `total` is at most this.
      total: tokens that were masked before the first step.
      left: tokens that still are masked.
      taken: steps taken, each of which wrote at least one.
    """
    if num_steps is None:
        return jnp.ones_like(left)
    if kind == "even":
        return -(-left // jnp.maximum(num_steps - taken, 1))
    if kind == "index":
        share = most // num_steps + (taken < most % num_steps)
        return jnp.broadcast_to(jnp.maximum(share, 1), left.shape)
    table = jnp.asarray(counts_table(kind, most, num_steps))
    return jnp.maximum(table[total, jnp.minimum(taken, table.shape[1] - 1)], 1)
