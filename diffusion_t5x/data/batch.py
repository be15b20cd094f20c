"""The batch that all objectives and decoders read."""

from typing import Literal

import flax.struct
from jaxtyping import Float, Int

from diffusion_t5x.shapes import AnyBoolBL, AnyIntBL, Array

Architecture = Literal["decoder_only", "encoder_decoder"]


class Batch(flax.struct.PyTreeNode):
    """Clean, unshifted tokens and their roles; all corruption, shifting and masking happens on device.

    Padding is recognised by `segment_ids == 0`, never by its token: pad tokens inside a target canvas are data.

    Attributes:
      tokens: decoder-only: inputs, then targets, then padding. Encoder-decoder: targets only.
      target_mask: the positions that the model must produce. The loss is computed there and nowhere else.
      segment_ids: 0 = empty, 1..n = the packed example that a position belongs to.
      positions: restart at 0 with each segment.
      example_ids: in training, the row's index in the global batch. In evaluation, the example's index in the
        evaluation set. A row's randomness is keyed by it.
      encoder_tokens, encoder_segment_ids, encoder_positions: the inputs, for an encoder-decoder. Inputs and targets of
        one example have the same segment id. None for a decoder-only model.
      written_at: for a text that a decoder wrote: see `decoding.decoder.Decoded`. None for data.
        An objective may put states of its own in their place (`Objective.prepare_rollout`).
      written_log_probability: likewise `Decoded.log_probability`. None for data.
      holes: for a text with holes of unknown length: n in the slots of the n-th of them, counted from 1, as many as it
        may have tokens; -1 in spare slots behind the row, of which as many are padding as the holes have slots without
        a token; 0 elsewhere. None: there are no such holes. See `decoding.resizing`.
      canvases: for a text that a decoder denoised as a whole: the row before each of its steps. None elsewhere.
      canvas_log_probability: of the tokens that each of these steps drew. None elsewhere.
      advantage: for a text that a reward judged: how much better it is than others for the same inputs. None elsewhere.
    """

    tokens: AnyIntBL
    target_mask: AnyBoolBL
    segment_ids: AnyIntBL
    positions: AnyIntBL
    example_ids: Int[Array, " batch"]
    encoder_tokens: Int[Array, "batch inputs"] | None = None
    encoder_segment_ids: Int[Array, "batch inputs"] | None = None
    encoder_positions: Int[Array, "batch inputs"] | None = None
    written_at: AnyIntBL | None = None
    written_log_probability: Float[Array, "batch length"] | None = None
    holes: AnyIntBL | None = None
    canvases: Int[Array, "batch steps length"] | None = None
    canvas_log_probability: Float[Array, "batch steps length"] | None = None
    advantage: Float[Array, " batch"] | None = None

    @property
    def input_mask(self) -> AnyBoolBL:
        """Positions that exist and are given, not produced."""
        return (self.segment_ids > 0) & ~self.target_mask
