"""The common part of step rules whose canvas is all MASK at first, and whose written tokens stay."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.canvas import Canvas, StepRule, Written
from diffusion_t5x.models.masks import BIDIRECTIONAL
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.sampling import Sampling
from diffusion_t5x.shapes import BoolBL, FloatBL, IntB1, IntBL, KeyB


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbsorbingRule(StepRule):
    """Writes masked targets. A written token stays, unless the rule says otherwise (`keeps_written`).

    Attributes:
      temperature: sampling temperature; 0 takes the most likely token. Whether texts follow the model's own
        distribution also depends on how positions are chosen: see `MaskedDecoder`.
      top_k, top_p: see `Sampling`.
    """

    keeps_written: ClassVar[bool] = True

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        Sampling(self.temperature, self.top_k, self.top_p)  # raises on bad values now, not in the middle of a run

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (Mode.of(BIDIRECTIONAL, "mask"),)

    def blank(self, batch: Batch, vocabulary: TokenIds, keys: KeyB) -> IntBL:
        """Returns the rows with MASK for targets."""
        return jnp.where(batch.target_mask, vocabulary.mask_id, batch.tokens)

    def eligible(self, tokens: IntBL, target_mask: BoolBL, vocabulary: TokenIds, step: IntB1) -> BoolBL:
        """The targets that are still masked."""
        return target_mask & (tokens == vocabulary.mask_id)

    def written(self, canvas: Canvas, chosen: BoolBL, tokens: IntBL, log_probability: FloatBL) -> Written:
        """Writes the chosen positions; the score is the sum of their log-probabilities."""
        return Written(
            tokens=jnp.where(chosen, tokens, canvas.tokens),
            mask=chosen,
            log_probability=log_probability,
            score=jnp.sum(jnp.where(chosen, log_probability, 0), axis=-1),
        )
