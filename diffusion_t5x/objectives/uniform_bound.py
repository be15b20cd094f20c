"""The evidence lower bound of diffusion with uniform noise (D3PM, arXiv 2107.03006, section 3.1 and appendix A)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.models.sampling import forbid
from diffusion_t5x.models.streams import stream
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.objectives.likelihood import estimate, uniform
from diffusion_t5x.objectives.objective import Likelihood
from diffusion_t5x.shapes import AnyBoolBL, Array, FloatBLD, IntBL, KeyScalar

# As in D3PM. There is no limit to go to: these models are not told the time, and one that leaves a clean token the
# probability 1 - e of being clean pays about e / i for it at step i, which has no finite sum.
NUM_STEPS = 1000


def step_divergence(
    logits: Float[jax.Array, "*shape vocab"],
    clean: Int[jax.Array, "*shape"],
    noisy: Int[jax.Array, "*shape"],
    step: Int[jax.Array, "*shape"],
    vocabulary: TokenIds,
    num_steps: int,
) -> Float[jax.Array, "*shape"]:
    """Returns KL(q(s | z, x) || p(s | z)) of one step back, in nats.

    At time t = i / T a token x is replaced, with probability t, by one drawn uniformly from the K ids of the noise
    vocabulary (the linear schedule). The step goes back from z at t = i / T to s at (i - 1) / T by the model's
    predictions p(x | z): p(s | z) = sum_x q(s | z, x) p(x | z). (Using their mean in place of x would be another, worse
    p.)

    With k(s) = p(s | z) / q(s | z, x), the sum of q (k - 1 - log k) over all s is the same divergence, and its terms
    are never negative: nothing cancels, however short the steps. q has closed forms for s = z, s = x and all other
    noise; k is linear in the prediction of s, with the same coefficients for all other noise.

    If z is not in the noise vocabulary (a sentinel, say), it is certainly clean: s = z under both q and p.

    Args:
      logits: the model's logits of x given z.
      clean, noisy, step: x, z and i, in 1..T.
      vocabulary: defines the noise vocabulary.
      num_steps: T.
    """
    ids = np.arange(logits.shape[-1])
    is_noise = np.isin(ids, vocabulary.noise_ids())
    size = is_noise.sum()
    log_p = jax.nn.log_softmax(forbid(logits, vocabulary))
    p = jnp.exp(log_p)
    at_clean, at_noisy = ids == clean[..., None], ids == noisy[..., None]
    log_p_clean = jnp.take_along_axis(log_p, clean[..., None], axis=-1)[..., 0]
    p_noisy = jnp.take_along_axis(p, noisy[..., None], axis=-1)[..., 0]
    p_not_noisy = jnp.sum(jnp.where(at_noisy, 0, p), axis=-1)

    # The last step, i = 1, is apart: s is x itself. Elsewhere both times are positive.
    i = jnp.maximum(step, 2).astype(jnp.float32)
    s, t, redrawn = (i - 1) / num_steps, i / num_steps, 1 / (num_steps - i + 1)
    kept, same = 1 - redrawn + redrawn / size, clean == noisy
    kappa = t / (size * (1 - t) + t)  # q(z | x != z) / q(z | x = z)
    rest = p_not_noisy + p_noisy * kappa

    stays = 1 - s + s / size
    q = jnp.where(same, stays * kept / (1 - t + t / size), s / t * kept)
    k_minus_1 = jnp.where(same, -p_not_noisy / (i * stays), p_noisy * size / ((i - 1) * (t + size * (1 - t))))
    at_z = q * (k_minus_1 - jnp.log1p(k_minus_1))

    by_noise = jnp.where(jnp.asarray(is_noise)[clean], s / size, 0)
    log_k = jnp.logaddexp(jnp.log1p(-s) + log_p_clean, jnp.log(by_noise * rest)) - jnp.log(1 - s + by_noise)
    at_x = (1 - s + by_noise) * redrawn / t * (jnp.expm1(log_k) - log_k)

    scale = jnp.where(same, 1 / kappa, 1)
    k = (scale * (1 - s) * size / s)[..., None] * p + (scale * rest)[..., None]
    other = is_noise & ~at_clean & ~at_noisy
    at_others = s * redrawn / (size * t * scale) * jnp.sum(jnp.where(other, k - 1 - jnp.log(k), 0), axis=-1)
    nowhere_in_q = jnp.sum(jnp.where(is_noise | at_clean, 0, p), axis=-1) / i

    divergence = at_z + jnp.where(same, 0, at_x) + at_others + nowhere_in_q
    return jnp.where(jnp.asarray(is_noise)[noisy], jnp.where(step == 1, -log_p_clean, divergence), 0)


def uniform_bound(
    model: Transformer,
    hidden: Callable[[IntBL], FloatBLD],
    batch: Batch,
    starts: Int[Array, " batch #length"],
    counted: AnyBoolBL,
    key: KeyScalar,
    num_draws: int,
    num_steps: int = NUM_STEPS,
) -> Likelihood:
    """Estimates the bound from its T terms (see `step_divergence`): each draw takes one per group of targets.

    Half of the draws choose steps uniformly, which suits the cost of noisy tokens, and half choose step i in proportion
    to 1 / i, which suits the cost of clean ones; each term is divided by its probability of being drawn.

    Args:
      model: computes the logits.
      hidden: from rows with noise, returns the hidden states that predict the batch's own tokens.
      batch: clean tokens.
      starts: row index of the first target of each target's group; one column if there is a single group.
      counted: targets whose bound is summed.
      key, num_draws: see `estimate`.
      num_steps: T. The bound holds for any.
    """
    vocabulary = model.vocabulary
    starts = jnp.broadcast_to(starts, batch.tokens.shape)
    harmonic = 1 / np.arange(1, num_steps + 1)
    chances = 0.5 / num_steps + 0.5 * harmonic / harmonic.sum()
    ends = jnp.asarray(np.cumsum(chances)[:-1], jnp.float32)
    weights = jnp.asarray(1 / chances, jnp.float32)

    def draw(keys, numbers):
        index = jnp.searchsorted(ends, jnp.take_along_axis(numbers, starts, axis=-1), side="right")
        where, what = stream(keys, "where"), stream(keys, "noise")
        replaced = batch.target_mask & (uniform(where, batch.tokens.shape[1]) < (index + 1) / num_steps)
        noise = jax.vmap(vocabulary.sample_noise, (0, None))(what, batch.tokens.shape[1:])
        noisy = jnp.where(replaced, noise, batch.tokens)

        def read_out(logits, clean, noisy, step):
            return step_divergence(logits, clean, noisy, step, vocabulary, num_steps)

        terms = model.map_logits(read_out, hidden(noisy), batch.tokens, noisy, index + 1)
        return -jnp.sum(jnp.where(counted, terms * weights[index], 0), axis=-1)

    return estimate(draw, vocabulary, batch, key, num_draws)
