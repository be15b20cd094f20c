"""Positions: T5's relative position bias, rotary positions, and learned positions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from diffusion_t5x.models.layers import normal, param
from diffusion_t5x.partitioning import constrain, platform
from diffusion_t5x.shapes import AnyIntBL, Array, FloatBLD, KeyScalar


def relative_position_bucket(
    relative_position: Int[Array, "*shape"], *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> Int[jax.Array, "*shape"]:
    """Returns T5's bucket of `key position - query position` (arXiv 1910.10683, section 2.1).

    Half of a direction's buckets are one distance each, the other half grow logarithmically up to `max_distance`. If
    attention only looks back, all buckets are for the past and the future is in bucket 0.
    """
    if bidirectional:
        num_buckets //= 2
        offset = jnp.where(relative_position > 0, num_buckets, 0)
        distance = jnp.abs(relative_position)
    else:
        offset = jnp.zeros_like(relative_position)
        distance = jnp.maximum(-relative_position, 0)
    exact = num_buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (num_buckets - exact)).astype(jnp.int32)
    return offset + jnp.where(distance < exact, distance, jnp.minimum(far, num_buckets - 1))


class RelativePositionBias(nnx.Module):
    """A learned bias for each bucket and head, shared by all layers.

    The weights depend on the buckets, not on the attention kind: a model trained with causal attention must use them in
    the same way after it is adapted to bidirectional attention. So our causal models have bidirectional buckets;
    published T5 decoders have `causal_buckets`.
    """

    def __init__(
        self, key: KeyScalar, num_heads: int, num_buckets: int, max_distance: int, causal_buckets: bool = False
    ):
        init = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        self.embedding = param(key, init, relative_buckets=num_buckets, heads=num_heads)
        self.max_distance = max_distance
        self.causal_buckets = causal_buckets

    def __call__(
        self, query_positions: Int[Array, "*rows queries"], key_positions: Int[Array, "*rows keys"]
    ) -> Float[jax.Array, "*rows heads queries keys"]:
        """Returns the bias of every pair of positions."""
        table = self.embedding.get_value()
        buckets = relative_position_bucket(
            key_positions[..., None, :] - query_positions[..., :, None],
            bidirectional=not self.causal_buckets,
            num_buckets=table.shape[0],
            max_distance=self.max_distance,
        )
        if platform() == "tpu":
            # Looked up, each pair's heads would take a whole vector register, 128 numbers wide.
            hot = jax.nn.one_hot(buckets, len(table), axis=0)
            return jnp.einsum("n...qk,nh->...hqk", hot, table, precision=jax.lax.Precision.HIGHEST)
        return jnp.moveaxis(table[buckets], -1, -3)


def rotary_frequencies(
    head_dim: int,
    base: float,
    factor: float = 1.0,
    stretched: tuple[float, float] | None = None,
    ramp: tuple[float, float] | None = None,
) -> Float[np.ndarray, " half_head_dim"]:
    """Returns the radians per token by which rotary positions rotate each pair.

    Args:
      head_dim: D, of the dimensions that are rotated.
      base: the frequencies are base^(-2i/D).
      factor, stretched, ramp: `ModelConfig.rotary_factor`, `rotary_stretched` and `rotary_ramp`.
    """
    half = head_dim // 2
    # Rounded once: times a thousand tokens the last digit counts, and in float32 each machine has a power of its own.
    frequencies = (1 / np.float64(base) ** (np.arange(half) / half)).astype(np.float32)
    if ramp is not None:
        kept = 1 - np.clip((np.arange(half) - ramp[0]) / (ramp[1] - ramp[0]), 0, 1).astype(np.float32)
    elif stretched is not None:
        slow, fast = 2 * np.pi / stretched[1], 2 * np.pi / stretched[0]
        kept = np.clip((frequencies - slow) / (fast - slow), 0, 1).astype(np.float32)
    else:
        return frequencies / np.float32(factor)
    return frequencies * kept + frequencies / np.float32(factor) * (1 - kept)


def rotate(
    x: Float[jax.Array, "batch length heads head_dim"],
    positions: AnyIntBL,
    frequency: Float[Array, " half_rotated"],
) -> Float[jax.Array, "batch length heads head_dim"]:
    """Rotary positions (arXiv 2104.09864): rotates the pair (i, i + R/2) of a head by position * frequency[i].

    R is twice the number of frequencies. Dimensions of a head after the first R are unchanged.
    """
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    half = frequency.shape[0]
    x1, x2, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)
    return turned.astype(x.dtype)


class LearnedPositions(nnx.Module):
    """A learned vector for each position, added to embedded tokens (arXiv 1705.03122).

    Positions after the last use the last vector. Only shifted rows of the model's full length have one such position,
    because the start token takes the first place.
    """

    def __init__(self, key: KeyScalar, length: int, embed_dim: int):
        self.embedding = param(key, normal(1.0), positions=length, embed=embed_dim)

    def __call__(self, x: FloatBLD, positions: AnyIntBL) -> FloatBLD:
        """Returns embedded tokens plus their positions' vectors."""
        # Gathered whole, as tokens are.
        table = constrain(self.embedding.get_value().astype(x.dtype), ("positions", "embed"))
        return x + table.at[positions].get(mode="clip")
