"""Ancestral sampling of masked diffusion: each step unmasks positions at random, as in the reverse process."""

import dataclasses

import jax.numpy as jnp

from diffusion_t5x.decoding.absorbing import AbsorbingRule
from diffusion_t5x.decoding.canvas import Canvas, Written
from diffusion_t5x.decoding.commit import propose
from diffusion_t5x.decoding.counts import unmasked_shares
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import BoolBL, FloatBLD, IntBL, KeyB


@dataclasses.dataclass(frozen=True)
class AncestralDecoder(AbsorbingRule):
    """Unmasks each target with the probability 1 - s / t in the step from time t to s (D3PM, arXiv 2107.03006).

    This is Dream's `origin` (arXiv 2508.15487), whose times are evenly spaced from 1 to 0.001. A written token stays.
    The score is that of `MaskedDecoder`.

    Attributes:
      num_steps: number of steps; the last one unmasks all remaining targets.
      temperature: sampling temperature; 0 takes the most likely token. Positions are random at any temperature.
      top_k, top_p: see `Sampling`.
    """

    num_steps: int = 32
    temperature: float = dataclasses.field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps < 1:
            raise UserError(f"AncestralDecoder.num_steps must be at least 1; got {self.num_steps}.")

    def most_steps(self, num_targets: int) -> int:
        return self.num_steps

    def write(
        self,
        model: Transformer,
        hidden: FloatBLD,
        canvas: Canvas,
        eligible: BoolBL,
        positions: IntBL,
        keys: KeyB,
    ) -> Written:
        """One step: writes at each eligible position with the step's probability."""

        def read_out(logits, positions):
            return propose(logits, keys, positions, model.vocabulary, self.sampling, "random")

        tokens, log_probability, drawn = model.map_logits(read_out, hidden, positions)
        chosen = eligible & (drawn < jnp.asarray(unmasked_shares(self.num_steps))[canvas.step])
        return self.written(canvas, chosen, tokens, log_probability)
