"""Samples tokens from logits."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key

from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError
from diffusion_t5x.shapes import AnyIntBL, Array, FloatBL, FloatBLV, IntBL, KeyB

_LEAST_TEMPERATURE = 1e-6  # logits over much less would overflow


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings for sampling a token.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token, otherwise at least 1e-6.
      top_k: only the k most likely tokens (arXiv 1805.04833); None allows all.
      top_p: only the smallest set of most likely tokens whose probabilities (at this temperature) sum to at least p
        (arXiv 1904.09751, section 3.1).
      min_p: only tokens that are at least this times as likely as the most likely one (arXiv 2407.01082).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or self.temperature >= _LEAST_TEMPERATURE):
            raise UserError(
                f"A sampling temperature must be 0, or at least {_LEAST_TEMPERATURE:g}; got {self.temperature}."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1; got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1]; got {self.top_p}.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must lie in [0, 1]; got {self.min_p}.")


def forbid(logits: Float[jax.Array, "*shape vocab"], vocabulary: TokenIds) -> Float[jax.Array, "*shape vocab"]:
    """Returns logits with -inf for all that no model may write.

    These are MASK, rows of the embedding without an id, and ids that the vocabulary rules out.
    """
    ids = jnp.arange(logits.shape[-1])
    allowed = (ids != vocabulary.mask_id) & (ids < vocabulary.size)
    if vocabulary.noise_only:
        ranges = [(ids >= first) & (ids < end) for first, end in vocabulary.noise_ranges]
        allowed = functools.reduce(jnp.logical_or, ranges)
    return jnp.where(allowed, logits, -jnp.inf)


def filter_logits(logits: Float[jax.Array, "*shape vocab"], sampling: Sampling) -> Float[jax.Array, "*shape vocab"]:
    """Logits over the temperature (1 if it is 0), -inf outside top-k, top-p and min-p; ties at the border stay."""
    logits = logits / (sampling.temperature or 1.0)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # The first one is always kept, even if p is 0 in float32.
        least_p = max(sampling.top_p, float(jnp.finfo(jnp.float32).tiny))
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < least_p
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.min_p:
        least = jnp.max(logits, axis=-1, keepdims=True) + math.log(sampling.min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def likeliest(logits: Float[jax.Array, "*shape vocab"]) -> Int[jax.Array, "*shape"]:
    """Returns the most likely id; of equals, the first.

    On CPU by two plain reductions: XLA's own argmax keeps value and index together, which it does not vectorize there.
    """

    def by_maximum(logits):
        best = logits == jnp.max(logits, axis=-1, keepdims=True)
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        return jnp.min(jnp.where(best, ids, logits.shape[-1] - 1), axis=-1)

    return jax.lax.platform_dependent(
        logits, cpu=by_maximum, default=lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32)
    )


def is_likeliest(logits: Float[jax.Array, "*shape vocab"], ids: Int[Array, "*shape"]) -> Bool[jax.Array, "*shape"]:
    """True where no other id is more likely. One reduction, so cheaper than to find the most likely id and compare."""
    return jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0] >= jnp.max(logits, axis=-1)


def uniform(keys: KeyB, positions: AnyIntBL) -> FloatBL:
    """Draws numbers from [0, 1), which depend only on the rows' keys and the positions."""
    draw = functools.partial(jax.random.uniform, dtype=jnp.float32)
    return jax.vmap(jax.vmap(draw))(_position_keys(keys, positions))


def gumbel(keys: KeyB, positions: AnyIntBL, number: int) -> Float[jax.Array, "batch length number"]:
    """Draws `number` standard Gumbel variables for each position; see `uniform`."""
    draw = functools.partial(jax.random.gumbel, shape=(number,), dtype=jnp.float32)
    return jax.vmap(jax.vmap(draw))(_position_keys(keys, positions))


def _position_keys(keys: KeyB, positions: AnyIntBL) -> Key[jax.Array, "batch length"]:
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, positions)


def sample(logits: FloatBLV, keys: KeyB, positions: AnyIntBL, sampling: Sampling) -> IntBL:
    """Samples tokens from logits.

    Args:
      logits: of every position.
      keys: a key for each row.
      positions: folded into the row's key: a draw depends on the position's number, not on the row's length.
      sampling: how to draw.
    """
    if sampling.temperature == 0:
        return likeliest(logits)
    logits = filter_logits(jax.lax.stop_gradient(logits), sampling)
    return jax.vmap(jax.vmap(jax.random.categorical))(_position_keys(keys, positions), logits).astype(jnp.int32)
