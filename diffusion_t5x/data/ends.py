"""Finds the end of a text among its targets."""

import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.shapes import AnyBoolBL, AnyIntBL, BoolBL


def after_end(tokens: AnyIntBL, batch: Batch, vocabulary: TokenIds) -> BoolBL:
    """Returns True after the first EOS or pad among the targets of its segment.

    The length of an output is decided only here: decoders drop everything after the end.

    Args:
      tokens: in place of the batch's own.
      batch: layout of the slots.
      vocabulary: its EOS and pad ids.
    """
    ends = batch.target_mask & vocabulary.is_end(tokens)
    ends_before = jnp.cumsum(ends, axis=-1) - ends
    segment_start = jnp.maximum(jnp.arange(tokens.shape[1]) - batch.positions, 0)
    return ends_before > jnp.take_along_axis(ends_before, segment_start, axis=-1)


def text_of(batch: Batch, vocabulary: TokenIds) -> AnyBoolBL:
    """Returns True for the targets of the text, including the one that ends it."""
    return batch.target_mask & ~after_end(batch.tokens, batch, vocabulary)
