"""ReMDM (arXiv 2503.00307): masked decoding whose steps may also take back what they wrote."""

import dataclasses

import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.canvas import Canvas, StepRule, Written
from diffusion_t5x.decoding.commit import propose
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.sampling import Sampling, uniform
from diffusion_t5x.models.streams import stream
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import BoolBL, FloatBLD, IntB1, IntBL, KeyB


@dataclasses.dataclass(frozen=True)
class RemaskingDecoder(StepRule):
    """Ancestral sampling of masked diffusion that masks a written token again with probability sigma ("ReMDM-cap").

    The score is the mean log-probability of the tokens that stayed, each in the step that wrote it. Higher is better.

    Attributes:
      num_steps: steps, as evenly spaced times.
      cap: sigma is at most this, and never more than the schedule allows; 0 is plain ancestral sampling.
      temperature: at which tokens are sampled.
    """

    num_steps: int = 32
    cap: float = 0.05
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.num_steps < 1 or not 0 <= self.cap <= 1 or self.temperature < 0:
            raise UserError(f"num_steps must be at least 1, cap in [0, 1], temperature at least 0; got {self}.")

    def blank(self, batch: Batch, vocabulary: TokenIds, keys: KeyB) -> IntBL:
        return jnp.where(batch.target_mask, vocabulary.mask_id, batch.tokens)

    def eligible(self, tokens: IntBL, target_mask: BoolBL, vocabulary: TokenIds, step: IntB1) -> BoolBL:
        return target_mask & (step < self.num_steps)

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
        """One step from time t to s, with the shares a and b of written tokens before and after it (equation 5)."""

        def read_out(logits, positions):
            return propose(logits, keys, positions, model.vocabulary, Sampling(self.temperature), "confidence")

        proposed, log_probability, _ = model.map_logits(read_out, hidden, positions)
        a, b = canvas.step / self.num_steps, (canvas.step + 1) / self.num_steps
        sigma = jnp.minimum(self.cap, jnp.where(a > 0, (1 - b) / a, 1))
        is_masked = canvas.tokens == model.vocabulary.mask_id
        chance = jnp.where(is_masked, (1 - b - sigma * a) / (1 - a), sigma)  # of being masked after the step
        becomes_masked = uniform(stream(keys, "remasking"), positions) < chance
        writes, takes_back = eligible & is_masked & ~becomes_masked, eligible & ~is_masked & becomes_masked
        tokens = jnp.where(writes, proposed, jnp.where(takes_back, model.vocabulary.mask_id, canvas.tokens))
        gained = jnp.where(writes, log_probability, 0) - jnp.where(takes_back, canvas.log_probability, 0)
        return Written(
            tokens=tokens,
            mask=writes | takes_back,
            log_probability=jnp.where(takes_back, -jnp.inf, log_probability),
            score=jnp.sum(gained, axis=-1),
        )
