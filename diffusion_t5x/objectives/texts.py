"""States and averages for objectives on whole texts, as in OPDLM's code (github.com/divelab/OPDLM at 3bb8bf6)."""

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import text_of
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.models.masks import BlocksFrom
from diffusion_t5x.models.output import Ratio
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.objectives.blocks import block_starts
from diffusion_t5x.objectives.objective import Normalize, normalized, stratified
from diffusion_t5x.shapes import AnyBoolBL, Array, IntBL, KeyScalar


def random_states(
    batch: Batch, vocabulary: TokenIds, block_size: int, key: KeyScalar, blocks_from: BlocksFrom = "targets"
) -> IntBL:
    """The tokens with random masks: a block's share of masks is uniform in [0, 1), and at least one target is masked.

    Args:
      batch: clean tokens.
      vocabulary: defines MASK.
      block_size: number of targets per block.
      key: rows draw from it by their `example_ids`.
      blocks_from: see `AttentionKind`.
    """
    starts = jnp.maximum(block_starts(batch, block_size, blocks_from), 0)
    length = batch.tokens.shape[1]
    share = stratified(stream(key, "time"), batch.example_ids, starts)
    keys = row_keys(stream(key, "where"), batch.example_ids)
    draws = jax.vmap(lambda key: jax.random.uniform(key, (length,), jnp.float32))(keys)
    of_targets = jnp.where(batch.target_mask, draws, jnp.inf)
    least = jax.vmap(lambda row, starts: jax.ops.segment_min(row, starts, length)[starts])(of_targets, starts)
    # Where no draw is below the share, the least one is of any of the block's targets alike.
    masked = batch.target_mask & ((draws < share) | (draws == least))
    return jnp.where(masked, vocabulary.mask_id, batch.tokens)


def scored_tokens(batch: Batch, vocabulary: TokenIds, noisy: IntBL, score_end: bool) -> AnyBoolBL:
    """Returns True for masked targets up to the one that ends the text, which counts with `score_end`."""
    scored = text_of(batch, vocabulary) & (noisy == vocabulary.mask_id)
    return scored if score_end else scored & ~vocabulary.is_end(batch.tokens)


def over_texts(
    batch: Batch, scored: AnyBoolBL, loss: Shaped[Array, "batch length"], normalize: Normalize = "sequences"
) -> Ratio:
    """Returns the loss of the scored targets; with "sequences", a text without any counts as 0 in the mean.

    Args:
      batch: its targets are the texts.
      scored: targets that count.
      loss: of every position.
      normalize: see `normalized`.
    """
    found = normalized(batch.replace(target_mask=scored), loss, normalize)
    if normalize != "sequences":
        return found
    return Ratio(found.numerator, normalized(batch, loss, normalize).denominator)
