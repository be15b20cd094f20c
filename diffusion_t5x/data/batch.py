"""The batch that all objectives and decoders read."""

from typing import Literal

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray
Architecture = Literal["decoder_only", "encoder_decoder"]


class Batch(flax.struct.PyTreeNode):
    """Clean, unshifted tokens and their roles; all corruption, shifting and masking happens on device.

    Padding is recognised by `segment_ids == 0`, never by its token: pad tokens inside a target canvas are data.

    Attributes:
      tokens: int32 `[B, L]`. Decoder-only: inputs, then targets, then padding. Encoder-decoder: targets only.
      target_mask: bool `[B, L]`, the positions that the model must produce. The loss is computed there and nowhere
        else.
      segment_ids: int32 `[B, L]`, 0 = empty, 1..n = the packed example that a position belongs to.
      positions: int32 `[B, L]`, restarting at 0 with each segment.
      example_ids: int32 `[B]`. Training: the row's index in the global batch. Evaluation: the example's index in the
        evaluation set. A row's randomness is keyed by it.
      encoder_tokens, encoder_segment_ids, encoder_positions: int32 `[B, S]`, the inputs, for an encoder-decoder. Inputs
        and targets of one example have the same segment id. None for a decoder-only model.
      written_at: int32 `[B, L]`, for a text that a decoder wrote: see `decoding.decoder.Decoded`. None for data.
    """

    tokens: Array
    target_mask: Array
    segment_ids: Array
    positions: Array
    example_ids: Array
    encoder_tokens: Array | None = None
    encoder_segment_ids: Array | None = None
    encoder_positions: Array | None = None
    written_at: Array | None = None

    @property
    def input_mask(self) -> Array:
        """bool `[B, L]`: positions that exist and are given, not produced."""
        return (self.segment_ids > 0) & ~self.target_mask
