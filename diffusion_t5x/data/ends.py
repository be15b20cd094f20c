"""Finds the end of a text among its targets."""

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Array, Batch
from diffusion_t5x.data.vocabularies import TokenIds


def after_end(tokens: Array, batch: Batch, vocabulary: TokenIds) -> jax.Array:
    """Returns bool `[B, L]`: True after the first EOS or pad among the targets of its segment.

    The length of an output is decided only here: decoders drop everything after the end.

    Args:
      tokens: int32 `[B, L]`, in place of the batch's own.
      batch: layout of the slots.
      vocabulary: its EOS and pad ids.
    """
    ends = batch.target_mask & vocabulary.is_end(tokens)
    ends_before = jnp.cumsum(ends, axis=-1) - ends
    segment_start = jnp.maximum(jnp.arange(tokens.shape[1]) - batch.positions, 0)
    return ends_before > jnp.take_along_axis(ends_before, segment_start, axis=-1)


def text_of(batch: Batch, vocabulary: TokenIds) -> Array:
    """Returns bool `[B, L]`: True for the targets of the text, including the one that ends it."""
    return batch.target_mask & ~after_end(batch.tokens, batch, vocabulary)
