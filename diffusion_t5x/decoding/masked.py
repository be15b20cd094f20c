"""Masked decoding: from a canvas of MASK, keep the surest tokens of each step until none is masked."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.commit import ORDERS, Order, choose, propose
from diffusion_t5x.decoding.decoder import Decoded, Decoder, Watch, Written, start_trace
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.layers import fold_in
from diffusion_t5x.models.masks import BIDIRECTIONAL
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.sampling import Sampling
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.objectives.objective import row_keys
from diffusion_t5x.objectives.reading import Reading


@dataclasses.dataclass(frozen=True)
class MaskedDecoder(Decoder):
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

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (Mode.of(BIDIRECTIONAL, "mask"),)

    def blank(self, batch: Batch, vocabulary: TokenIds, keys: jax.Array) -> jax.Array:
        """The rows with MASK for targets."""
        return jnp.where(batch.target_mask, vocabulary.mask_id, batch.tokens)

    def eligible(self, canvas: jax.Array, target_mask: jax.Array, vocabulary: TokenIds, step: jax.Array) -> jax.Array:
        """Whatever is masked still."""
        return target_mask & (canvas == vocabulary.mask_id)

    def most_steps(self, num_targets: int) -> int:
        return min(self.num_steps or num_targets, num_targets)

    def write(
        self,
        model: Transformer,
        hidden: jax.Array,
        canvas: jax.Array,
        eligible: jax.Array,
        positions: jax.Array,
        keys: jax.Array,
        step: jax.Array,
    ) -> Written:
        """One step: some of the eligible positions are written, for good; see `InnerDecoder.write`."""
        keys_of_step = fold_in(keys, step)

        def read_out(logits, positions):
            return propose(logits, keys_of_step, positions, model.vocabulary, self.sampling, self.order)

        tokens, log_probability, certainty = model.map_logits(read_out, hidden, positions)
        left = jnp.sum(eligible, axis=-1)
        # The share of this step, rounded up, of what is left for all: shares differ by one at most.
        count = jnp.ones_like(left) if self.num_steps is None else -(-left // (self.num_steps - step))
        chosen = choose(certainty, eligible, count, self.threshold)
        return Written(
            tokens=jnp.where(chosen, tokens, canvas),
            mask=chosen,
            log_probability=log_probability,
            score=jnp.sum(jnp.where(chosen, log_probability, 0), axis=-1),
        )

    def decode(self, model: Transformer, batch: Batch, key: jax.Array, trace: bool | Watch = False) -> Decoded:
        vocabulary, length = model.vocabulary, batch.tokens.shape[1]
        keys = row_keys(key, batch.example_ids)
        reading, encoded = Reading.of(batch, vocabulary, model.config.shifted), model.encode(batch)

        def masked(canvas, step):
            return self.eligible(canvas, batch.target_mask, vocabulary, step)

        def unfinished(carry):
            return jnp.any(masked(carry["canvas"], carry["step"]))

        def write_some(carry):
            step, before = carry["step"], carry["canvas"]
            hidden = reading.hidden(model, before, BIDIRECTIONAL, encoded)
            written = self.write(model, hidden, before, masked(before, step), batch.positions, keys, step)
            if trace:
                carry["trace"] = carry["trace"].record(step, written.tokens, written.mask, written.log_probability)
            return carry | {
                "step": step + 1,
                "canvas": written.tokens,
                "total": carry["total"] + written.score,
                "written_at": jnp.where(written.mask, step, carry["written_at"]),
            }

        canvas = self.blank(batch, vocabulary, keys)
        carry = {
            "step": 0,
            "canvas": canvas,
            "total": jnp.zeros(len(canvas)),
            "written_at": jnp.full_like(canvas, -1),
            "trace": start_trace(trace, canvas, self.most_steps(length)),
        }
        carry = jax.lax.while_loop(unfinished, write_some, carry)
        return Decoded.of(
            carry["canvas"],
            batch,
            vocabulary,
            scores=carry["total"] / jnp.maximum(jnp.sum(batch.target_mask, axis=-1), 1),
            steps=jnp.asarray(carry["step"]),
            row_steps=jnp.max(carry["written_at"], axis=-1) + 1,
            written_at=carry["written_at"],
            trace=carry["trace"] and carry["trace"].end(carry["step"]),
        )
