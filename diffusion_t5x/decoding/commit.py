"""One step of masked decoding: proposes a token at every position, then chooses the positions that keep theirs."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Real

from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.models.sampling import Sampling, filter_logits, forbid, sample, uniform
from diffusion_t5x.models.streams import stream
from diffusion_t5x.shapes import BoolBL, FloatBL, FloatBLV, IntBL, KeyB

Order = Literal["confidence", "entropy", "margin", "random", "sequential"]
Softmax = Literal["allowed", "all", "filtered"]


def propose(
    logits: FloatBLV,
    keys: KeyB,
    positions: IntBL,
    vocabulary: TokenIds,
    sampling: Sampling,
    order: Order,
    softmax: Softmax = "allowed",
    last: Bool[jax.Array, " vocab"] | None = None,
) -> tuple[IntBL, FloatBL, FloatBL]:
    """Returns a token for every position, its log-probability, and the position's certainty.

    The log-probability is the model's at temperature 1 over all ids that may be written (not MASK), however the token
    is drawn.

    Args:
      logits: of every position.
      keys: a key for each row and step.
      positions: position numbers; a draw depends only on its position's number.
      vocabulary: defines the ids that may be written.
      sampling: how to draw.
      order: definition of certainty. "confidence": the probability of the proposed token (MaskGIT, arXiv 2202.04200,
        section 3.2). "entropy": minus the entropy, in nats. "margin": the most likely token's probability minus the
        next one's (arXiv 2502.06768). "random": a number drawn from [0, 1). "sequential": decreasing from left to
        right.
      softmax: the distribution that certainty is computed from. "allowed": ids that may be written. "all": all rows of
        the embedding, including MASK, as in published code. "filtered": all rows, with the temperature, top-k and
        top-p of sampling.
      last: tokens whose positions come last; they are left out of the certainty of other positions.
    """
    allowed = forbid(logits, vocabulary)
    tokens = sample(allowed, stream(keys, "tokens"), positions, sampling)
    log_probabilities = jax.nn.log_softmax(allowed)
    log_probability = jnp.take_along_axis(log_probabilities, tokens[..., None], axis=-1)[..., 0]
    if softmax != "allowed" or last is not None:
        judged = {"allowed": allowed, "all": logits, "filtered": filter_logits(logits, sampling)}[softmax]
        judged = judged if last is None else jnp.where(last, -jnp.inf, judged)
        log_probabilities = jax.nn.log_softmax(judged)
    if order == "confidence":
        certainty = jnp.exp(jnp.take_along_axis(log_probabilities, tokens[..., None], axis=-1)[..., 0])
    elif order == "entropy":
        certainty = -jax.scipy.special.entr(jnp.exp(log_probabilities)).sum(axis=-1)
    elif order == "margin":
        first, second = jnp.moveaxis(jax.lax.top_k(jnp.exp(log_probabilities), 2)[0], -1, 0)
        certainty = first - second
    elif order == "sequential":
        certainty = -positions.astype(jnp.float32)
    else:
        certainty = uniform(stream(keys, "order"), positions)
    if last is not None:
        certainty = jnp.where(last[tokens], -jnp.inf, certainty)
    return tokens, log_probability, certainty


def choose(
    certainty: FloatBL,
    eligible: BoolBL,
    count: Real[jax.Array, " batch"],
    threshold: float | None = None,
    threshold_included: bool = False,
) -> BoolBL:
    """Returns the `count` most certain eligible positions of each row; ties go to the earlier position.

    Args:
      certainty: of every position.
      eligible: if a row has at most `count`, all are chosen.
      count: a whole number for each row.
      threshold: all eligible positions with a greater certainty are chosen as well.
      threshold_included: also choose positions with exactly this certainty.
    """
    # Eligibility is a key of its own: even if certainty is NaN, as many positions are chosen, and decoding ends.
    order = jnp.lexsort((-certainty, ~eligible), axis=-1)
    chosen = eligible & (jnp.argsort(order, axis=-1) < count[:, None])
    if threshold is None:
        return chosen
    return chosen | (eligible & (certainty >= threshold if threshold_included else certainty > threshold))
