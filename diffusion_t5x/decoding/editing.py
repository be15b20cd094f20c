"""Token editing: masked decoding that also replaces what it has written."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.absorbing import AbsorbingRule
from diffusion_t5x.decoding.canvas import Canvas, Written
from diffusion_t5x.decoding.commit import Softmax, choose, propose
from diffusion_t5x.decoding.counts import step_count
from diffusion_t5x.errors import UserError, check_choices
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import BoolBL, FloatBLD, IntB, IntB1, IntBL, KeyB


@dataclasses.dataclass(frozen=True)
class EditingDecoder(AbsorbingRule):
    """Writes masked targets above one threshold, and replaces written ones above another (LLaDA2.1).

    Both happen in the same step. A row is done after a step that finds no mask and edits nothing. The score is the
    log-probability that each token had in the step that wrote it last, averaged over targets. Higher is better.

    Attributes:
      threshold: a step writes every masked target whose token's probability exceeds it.
      editing_threshold: a step replaces a written token if the probability of another one exceeds this; 1: never.
      min_tokens: a step writes at least this many masked targets, the most confident first, or all that are left.
      num_steps: masks are gone after this many steps: a step also writes at least an even share of those that are left.
        None: as many steps as `min_tokens` takes.
      extra_steps: maximum number of steps after the one that wrote the last mask; at least 1.
      softmax: distribution of these probabilities, see `commit.propose`.
      temperature: sampling temperature; 0 takes the most likely token.
      top_k, top_p: see `Sampling`.
    """

    keeps_written: ClassVar[bool] = False

    threshold: float = 0.7
    editing_threshold: float = 0.5
    min_tokens: int = 1
    extra_steps: int = 16
    num_steps: int | None = None
    softmax: Softmax = "allowed"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        for name in ("threshold", "editing_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"EditingDecoder.{name} must be a probability; got {getattr(self, name)}.")
        for name in ("min_tokens", "extra_steps", "num_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"EditingDecoder.{name} must be at least 1; got {getattr(self, name)}.")

    def eligible(self, tokens: IntBL, target_mask: BoolBL, vocabulary: TokenIds, step: IntB1) -> BoolBL:
        """Returns all targets: each step decides whether a row is finished."""
        return target_mask

    def most_steps(self, num_targets: int) -> int:
        writing = -(-num_targets // self.min_tokens)
        return min(writing, self.num_steps or writing) + self.extra_steps

    def start_memory(self, model: Transformer, tokens: IntBL) -> IntB:
        """Returns the number of steps that each row has taken without a mask."""
        return jnp.zeros(len(tokens), jnp.int32)

    def write(
        self,
        model: Transformer,
        hidden: FloatBLD,
        canvas: Canvas,
        eligible: BoolBL,
        positions: IntBL,
        keys: KeyB,
    ) -> Written:
        """Takes one step: writes masked targets, and replaces written ones."""

        def read_out(logits, positions):
            return propose(logits, keys, positions, model.vocabulary, self.sampling, "confidence", self.softmax)

        tokens, log_probability, certainty = model.map_logits(read_out, hidden, positions)
        masked = eligible & (canvas.tokens == model.vocabulary.mask_id)
        total, left = (jnp.sum(x, axis=-1, dtype=jnp.int32) for x in (eligible, masked))
        count = jnp.full_like(left, self.min_tokens)
        if self.num_steps is not None:
            share = step_count("even", self.num_steps, eligible.shape[1], total, left, canvas.step[:, 0])
            count = jnp.maximum(count, share)
        writes = choose(certainty, masked, count, self.threshold)
        edits = eligible & ~masked & (tokens != canvas.tokens) & (certainty > self.editing_threshold)
        is_full = ~jnp.any(masked, axis=-1)
        extra = canvas.memory + is_full
        written = self.written(canvas, writes | edits, tokens, log_probability)
        replaced = jnp.sum(jnp.where(edits, canvas.log_probability, 0), axis=-1)
        return written.replace(
            score=written.score - replaced,
            finished=is_full & (~jnp.any(edits, axis=-1) | (extra >= self.extra_steps)),
            memory=extra,
        )
