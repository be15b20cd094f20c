"""Masked decoding: from a canvas of MASK, keeps the most confident tokens of each step until none is masked."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.canvas import Canvas, StepRule, Written
from diffusion_t5x.decoding.commit import Order, choose, propose
from diffusion_t5x.errors import UserError, check_choices
from diffusion_t5x.models.masks import BIDIRECTIONAL
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.sampling import Sampling
from diffusion_t5x.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class MaskedDecoder(StepRule):
    """Unmasks in `num_steps` steps (LLaDA, arXiv 2502.09992), or above a confidence (Fast-dLLM, 2505.22618).

    A written token stays. The score is the log-probability that each token had when it was written, averaged over
    targets: conditionals from different steps, not a likelihood. Higher is better.

    Attributes:
      num_steps: a row's targets are divided over this many steps as evenly as possible, with more in the first ones;
        rows with fewer targets write one per step. None: one per step.
      threshold: a step also writes every token whose probability exceeds it, and the rest is divided over the remaining
        steps; decoding stops when all rows are done. Fast-dLLM uses 0.9, with num_steps None.
      order: the order of positions, see `commit.propose`. A threshold needs "confidence".
      temperature: sampling temperature; 0 takes the most likely token.
      top_k, top_p: see `Sampling`.
    """

    keeps_written: ClassVar[bool] = True

    num_steps: int | None = 10
    threshold: float | None = None
    order: Order = "confidence"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        self.sampling  # noqa: B018  (raises on bad values now, not in the middle of a run)
        check_choices(self)
        if self.num_steps is not None and self.num_steps < 1:
            raise UserError(f"MaskedDecoder.num_steps must be at least 1, or None; got {self.num_steps}.")
        if self.threshold is not None and (not 0 <= self.threshold <= 1 or self.order != "confidence"):
            raise UserError(
                f"MaskedDecoder.threshold must be a probability and belongs to the order of confidence; got {self}."
            )

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (Mode.of(BIDIRECTIONAL, "mask"),)

    def blank(self, batch: Batch, vocabulary: TokenIds, keys: jax.Array) -> jax.Array:
        """Returns the rows with MASK for targets."""
        return jnp.where(batch.target_mask, vocabulary.mask_id, batch.tokens)

    def eligible(self, tokens: jax.Array, target_mask: jax.Array, vocabulary: TokenIds, step: jax.Array) -> jax.Array:
        """Returns the targets that are still masked."""
        return target_mask & (tokens == vocabulary.mask_id)

    def most_steps(self, num_targets: int) -> int:
        return min(self.num_steps or num_targets, num_targets)

    def write(
        self,
        model: Transformer,
        hidden: jax.Array,
        canvas: Canvas,
        eligible: jax.Array,
        positions: jax.Array,
        keys: jax.Array,
    ) -> Written:
        """Takes one step: writes some of the eligible positions, permanently."""

        def read_out(logits, positions):
            return propose(logits, keys, positions, model.vocabulary, self.sampling, self.order)

        tokens, log_probability, certainty = model.map_logits(read_out, hidden, positions)
        left = jnp.sum(eligible, axis=-1, dtype=jnp.int32)
        # The share of this step, rounded up, of what is left for all: shares differ by one at most.
        count = jnp.ones_like(left) if self.num_steps is None else -(-left // (self.num_steps - canvas.step))
        chosen = choose(certainty, eligible, count, self.threshold)
        return Written(
            tokens=jnp.where(chosen, tokens, canvas.tokens),
            mask=chosen,
            log_probability=log_probability,
            score=jnp.sum(jnp.where(chosen, log_probability, 0), axis=-1),
        )
