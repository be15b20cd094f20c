"""Monte Carlo log-likelihoods: an estimator for all bounds, and the bound of masked diffusion."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Int

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import text_of
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.layers import fold_in
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.objectives.objective import Likelihood
from diffusion_t5x.shapes import AnyBoolBL, Array, FloatB, FloatBL, IntBL, KeyB, KeyScalar

Draw = Callable[[KeyB, FloatBL], FloatB]


def check_num_draws(num_draws: int) -> None:
    if num_draws < 2 or num_draws % 2:
        raise UserError(f"num_draws must be an even number, at least 2, not {num_draws}: draws come in pairs.")


def estimate(draw: Draw, vocabulary: TokenIds, batch: Batch, key: KeyScalar, num_draws: int) -> Likelihood:
    """Returns the mean of a random log-likelihood over draws that cover [0, 1) evenly.

    [0, 1) is divided into `num_draws / 2` equal parts with two independent draws each. The square of their difference
    is an unbiased estimate of the variance in that part, and gives the standard error. (The spread of all draws would
    overstate it: it includes differences between parts, which are not random.) Draws are computed one after another, so
    they need the memory of one (without gradients). A few are not a loop: XLA on CPU runs it faster.

    Args:
      draw: from keys and numbers, independent and uniform in the draw's part of [0, 1), returns the log-likelihood;
        unbiased if the numbers are uniform in [0, 1).
      vocabulary: defines where texts end.
      batch: rows with one example each.
      key: rows draw from it by their `example_ids`.
      num_draws: an even number.
    """
    check_num_draws(num_draws)
    parts = num_draws // 2
    keys = row_keys(key, batch.example_ids)

    def one(number):
        offset = uniform(fold_in(stream(keys, "offsets"), number), batch.tokens.shape[1])
        return draw(fold_in(stream(keys, "draws"), number), (number // 2 + offset) / parts)

    _, found = jax.lax.scan(lambda _, number: (None, one(number)), None, jnp.arange(num_draws), unroll=num_draws <= 4)
    pairs = found.reshape(parts, 2, -1)
    spread = jnp.sum(jnp.square(pairs[:, 0] - pairs[:, 1]), axis=0)
    return Likelihood(
        log_likelihood=jnp.mean(pairs, axis=(0, 1)),
        standard_error=jnp.sqrt(spread) / num_draws,
        num_tokens=jnp.sum(text_of(batch, vocabulary), axis=-1, dtype=jnp.int32),
    )


def uniform(keys: KeyB, length: int) -> FloatBL:
    """Draws `length` numbers per key, uniform in [0, 1); longer rows begin with the same ones."""
    return jax.vmap(lambda key: jax.random.uniform(key, (length,), jnp.float32))(keys)


def masked_bound(
    nll: Callable[[IntBL], FloatBL],
    vocabulary: TokenIds,
    batch: Batch,
    starts: Int[Array, " batch #length"],
    counted: AnyBoolBL,
    key: KeyScalar,
    num_draws: int,
) -> Likelihood:
    """Returns the evidence lower bound of masked diffusion, in groups of targets that are masked independently.

    Of a group's n targets, l ~ U{1..n} are masked, each equally likely, and n/l times their summed cross-entropy is
    minus an estimate of the bound: that of times t ~ U[0, 1] and weights 1/t without the randomness of the number of
    masks (LLaDA, arXiv 2502.09992, equation 6; the same for any schedule: MDLM, arXiv 2406.07524, section 3.5).

    Args:
      nll: from rows with masks, returns the cross-entropy of the batch's own tokens.
      vocabulary: defines MASK.
      batch: clean tokens.
      starts: row index of the first target of each target's group; one column if there is a single group. Groups have
        no gaps.
      counted: targets whose bound is summed.
      key, num_draws: see `estimate`.
    """
    slots = jnp.arange(batch.tokens.shape[1])
    starts = jnp.where(batch.target_mask, starts, slots)  # other slots are groups of their own, of no targets
    count = jax.vmap(lambda starts, is_target: jax.ops.segment_sum(is_target, starts, slots.size)[starts])
    sizes = count(starts, batch.target_mask.astype(jnp.int32))

    def draw(keys, numbers):
        number = jnp.take_along_axis(numbers, starts, axis=-1)
        num_masked = jnp.clip(jnp.floor(number * sizes) + 1, 1, jnp.maximum(sizes, 1))
        # Groups have no gaps, so each keeps its place when slots are sorted by group, and at random inside groups.
        order = jnp.lexsort((uniform(keys, slots.size), starts))
        rank = jnp.argsort(order, axis=-1) - starts
        masked = batch.target_mask & (rank < num_masked)
        terms = nll(jnp.where(masked, vocabulary.mask_id, batch.tokens)) * sizes / num_masked
        return -jnp.sum(jnp.where(masked & counted, terms, 0), axis=-1)

    return estimate(draw, vocabulary, batch, key, num_draws)
