"""Masked decoding: from a canvas of MASK, keep the surest tokens of each step until none is masked."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.decoding.commit import ORDERS, Order, choose, propose
from diffusion_t5x.decoding.decoder import Decoded, end_at_eos
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.layers import fold_in
from diffusion_t5x.models.masks import BIDIRECTIONAL, Slots
from diffusion_t5x.models.sampling import Sampling
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.objectives.masked import start_first
from diffusion_t5x.objectives.objective import row_keys


@dataclasses.dataclass(frozen=True)
class MaskedDecoder:
    """Unmasks in `num_steps` steps (LLaDA, arXiv 2502.09992), or whatever is sure enough (Fast-dLLM, 2505.22618).

    A token that is written stays. The score is the mean over targets of the log-probability that a token had when it
    was written: a sum of conditionals from different steps, not a likelihood. Higher is better.

    Attributes:
      num_steps: a row's targets are shared out over so many steps as equally as can be, more in the first ones; rows
        with fewer targets take one a step. None: one a step.
      threshold: a step moreover writes every token whose probability exceeds it, and the rest is shared out over the
        steps that are left; decoding stops when all rows are done. Fast-dLLM's is 0.9, with num_steps None.
      order: which positions come first: see `commit.propose`. A threshold is one of confidence.
      temperature: at which tokens are sampled; 0 takes the likeliest.
      top_k, top_p: see `Sampling`.
    """

    num_steps: int | None = 10
    threshold: float | None = None
    order: Order = "confidence"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        self.sampling  # noqa: B018  (raises on bad values now, not in the middle of a run)
        if self.order not in ORDERS:
            raise UserError(f"MaskedDecoder.order must be one of {', '.join(ORDERS)}, not {self.order!r}.")
        if self.num_steps is not None and self.num_steps < 1:
            raise UserError(f"MaskedDecoder.num_steps must be at least 1, or None; got {self.num_steps}.")
        if self.threshold is not None and (not 0 <= self.threshold <= 1 or self.order != "confidence"):
            raise UserError(
                f"MaskedDecoder.threshold must be a probability and belongs to the order of confidence; got {self}."
            )

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    def write(
        self,
        model: Transformer,
        hidden: jax.Array,
        canvas: jax.Array,
        eligible: jax.Array,
        positions: jax.Array,
        keys: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """One step: some of the eligible positions are written.

        Args:
          model: reads the logits out.
          hidden: `[B, L, D]`, of this canvas.
          canvas: int32 `[B, L]`, or a part of it.
          eligible: bool `[B, L]`, what is still to be written.
          positions: int32 `[B, L]`, see `propose`.
          keys: `[B]`, a key for each row.
          step: how many steps were taken before.

        Returns:
          The new canvas, and per row `[B]` the summed log-probability of what was written.
        """
        keys_of_step = fold_in(keys, step)

        def read_out(logits, positions):
            return propose(logits, keys_of_step, positions, model.vocabulary, self.sampling, self.order)

        tokens, log_probability, certainty = model.map_logits(read_out, hidden, positions)
        left = jnp.sum(eligible, axis=-1)
        # The share of this step, rounded up, of what is left for all: shares differ by one at most.
        count = jnp.ones_like(left) if self.num_steps is None else -(-left // (self.num_steps - step))
        chosen = choose(certainty, eligible, count, self.threshold)
        return jnp.where(chosen, tokens, canvas), jnp.sum(jnp.where(chosen, log_probability, 0), axis=-1)

    def decode(self, model: Transformer, batch: Batch, key: jax.Array, trace: bool = False) -> Decoded:
        vocabulary, length = model.vocabulary, batch.tokens.shape[1]
        keys = row_keys(key, batch.example_ids)
        slots, encoded = Slots.of(batch), model.encode(batch)

        def masked(canvas):
            return batch.target_mask & (canvas == vocabulary.mask_id)

        def unfinished(carry):
            _, canvas, _, _ = carry
            return jnp.any(masked(canvas))

        def write_some(carry):
            step, canvas, total, history = carry
            hidden = model(start_first(canvas, batch.positions, vocabulary), slots, BIDIRECTIONAL, encoded)
            canvas, written = self.write(model, hidden, canvas, masked(canvas), batch.positions, keys, step)
            total += written
            if trace:
                history = history.at[step + 1].set(canvas)
            return step + 1, canvas, total, history

        most_steps = min(self.num_steps or length, length)
        canvas = jnp.where(batch.target_mask, vocabulary.mask_id, batch.tokens)
        history = jnp.broadcast_to(canvas, (most_steps + 1, *canvas.shape)) if trace else None
        carry = (0, canvas, jnp.zeros(len(canvas)), history)
        steps, canvas, total, history = jax.lax.while_loop(unfinished, write_some, carry)
        if trace:  # steps after the last one that was taken show the end
            taken = jnp.arange(most_steps + 1)[:, None, None] <= steps
            history = jnp.where(taken, history, canvas)
        return Decoded(
            tokens=end_at_eos(canvas, batch, vocabulary),
            scores=total / jnp.maximum(jnp.sum(batch.target_mask, axis=-1), 1),
            steps=jnp.asarray(steps),
            trace=history,
        )
