"""One step of masked decoding: proposes a token at every position, then chooses the positions that keep theirs."""

from typing import Literal

import jax
import jax.numpy as jnp

from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.models.sampling import Sampling, forbid, sample, uniform
from diffusion_t5x.models.streams import stream

Order = Literal["confidence", "entropy", "margin", "random"]


def propose(
    logits: jax.Array, keys: jax.Array, positions: jax.Array, vocabulary: TokenIds, sampling: Sampling, order: Order
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns a token for every position, its log-probability, and the position's certainty, all `[B, L]`.

    Log-probability and certainty are the model's at temperature 1 over all ids that may be written (not MASK), however
    the token is drawn.

    Args:
      logits: float32 `[B, L, V]`.
      keys: `[B]`, a key for each row and step.
      positions: int32 `[B, L]`; a draw at a position depends only on its number.
      vocabulary: defines the ids that may be written.
      sampling: how to draw.
      order: the measure of certainty. "confidence": the probability of the proposed token. "entropy": minus the
        entropy, in nats. "margin": the most likely token's probability minus the next one's. "random": a number drawn
        from [0, 1).
    """
    logits = forbid(logits, vocabulary)
    tokens = sample(logits, stream(keys, "tokens"), positions, sampling)
    log_probabilities = jax.nn.log_softmax(logits)
    log_probability = jnp.take_along_axis(log_probabilities, tokens[..., None], axis=-1)[..., 0]
    if order == "confidence":
        certainty = jnp.exp(log_probability)
    elif order == "entropy":
        certainty = -jax.scipy.special.entr(jnp.exp(log_probabilities)).sum(axis=-1)
    elif order == "margin":
        first, second = jnp.moveaxis(jax.lax.top_k(jnp.exp(log_probabilities), 2)[0], -1, 0)
        certainty = first - second
    else:
        certainty = uniform(stream(keys, "order"), positions)
    return tokens, log_probability, certainty


def choose(certainty: jax.Array, eligible: jax.Array, count: jax.Array, threshold: float | None = None) -> jax.Array:
    """Returns bool `[B, L]`: the `count` most certain eligible positions of each row; of equal ones, the earlier first.

    Args:
      certainty: `[B, L]`.
      eligible: bool `[B, L]`; if a row has at most `count`, all are chosen.
      count: int32 `[B]`.
      threshold: eligible positions of greater certainty are chosen as well, however many.
    """
    # Eligibility is a key of its own: even if certainty is NaN, as many positions are chosen, and decoding ends.
    order = jnp.lexsort((-certainty, ~eligible), axis=-1)
    chosen = eligible & (jnp.argsort(order, axis=-1) < count[:, None])
    return chosen if threshold is None else chosen | (eligible & (certainty > threshold))
