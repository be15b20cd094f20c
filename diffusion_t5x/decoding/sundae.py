"""SUNDAE decoding: denoise whole canvases of random tokens, many at once, and keep the best."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.decoder import Decoded, Trace, Written
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.layers import fold_in
from diffusion_t5x.models.masks import BIDIRECTIONAL, Slots
from diffusion_t5x.models.sampling import Sampling, forbid, sample
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.objectives.objective import cross_entropy, row_keys


@dataclasses.dataclass(frozen=True)
class SundaeDecoder:
    """Denoises `num_samples` canvases of uniform noise for `num_steps` steps and keeps each example's best.

    The score is the cross-entropy, in nats a target position, between the canvas that the last step reads and the
    logits that it gives: how little the model still wants to change ("model score", arXiv 2401.17181 section 3).
    Lower is better; it is no log-probability.

    Attributes:
      num_steps: model steps.
      num_samples: canvases for each example.
      temperature: at which every step samples all targets; 0 takes the likeliest.
    """

    num_steps: int = 10
    num_samples: int = 8
    temperature: float = 0.2

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.num_samples < 1 or self.temperature < 0:
            raise UserError(
                f"SundaeDecoder needs num_steps and num_samples of at least 1 and a temperature of at least 0; "
                f"got {self}."
            )

    def blank(self, batch: Batch, vocabulary: TokenIds, keys: jax.Array) -> jax.Array:
        """The rows with noise for targets."""
        noise = jax.vmap(vocabulary.sample_noise, (0, None))(fold_in(keys, self.num_steps), batch.tokens.shape[1:])
        return jnp.where(batch.target_mask, noise, batch.tokens)

    def eligible(self, canvas: jax.Array, target_mask: jax.Array, vocabulary: TokenIds, step: jax.Array) -> jax.Array:
        return target_mask & (step < self.num_steps)

    def most_steps(self, num_targets: int) -> int:
        return self.num_steps

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
        """One step: every eligible position is written anew.

        Takes and gives what `InnerDecoder.write` does. The score is the sum of the log-probabilities of the tokens that
        the last step reads, and 0 before.
        """
        keys_of_step = fold_in(keys, step)

        def read_out(logits, tokens, positions):
            logits = forbid(logits, model.vocabulary)
            wish, _ = cross_entropy(logits, tokens)
            written = sample(logits, keys_of_step, positions, Sampling(self.temperature))
            return written, cross_entropy(logits, written)[1], wish

        tokens, surprise, wish = model.map_logits(read_out, hidden, canvas, positions)
        counts = eligible & (step == self.num_steps - 1)
        return Written(
            tokens=jnp.where(eligible, tokens, canvas),
            mask=eligible,
            log_probability=-surprise,
            score=-jnp.sum(jnp.where(counts, wish, 0), axis=-1),
        )

    def decode(self, model: Transformer, batch: Batch, key: jax.Array, trace: bool = False) -> Decoded:
        vocabulary, samples = model.vocabulary, self.num_samples
        example_keys = row_keys(key, batch.example_ids)
        keys = jax.vmap(lambda k: jax.vmap(lambda n: jax.random.fold_in(k, n))(jnp.arange(samples)))(example_keys)
        keys = keys.reshape(-1)  # rows: example by example, each one's samples together
        rows = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), batch)
        slots = Slots.of(rows)
        encoded = model.encode(batch)
        encoded = encoded and encoded.repeat(samples)

        noise = self.blank(rows, vocabulary, keys)

        def denoise(step, carry):
            canvas, _, history = carry
            hidden = model(canvas, slots, BIDIRECTIONAL, encoded)
            written = self.write(model, hidden, canvas, rows.target_mask, rows.positions, keys, step)
            if trace:
                history = history.record(step, written.tokens, written.mask, written.log_probability)
            return written.tokens, written.score, history

        history = Trace.start(noise, self.num_steps) if trace else None
        final, totals, history = jax.lax.fori_loop(0, self.num_steps, denoise, (noise, jnp.zeros(len(noise)), history))
        scores = -totals / jnp.maximum(jnp.sum(rows.target_mask, axis=-1), 1)
        best = jnp.argmin(scores.reshape(-1, samples), axis=-1)

        def keep(x):  # [..., B * samples, L] -> [..., B, L]
            x = x.reshape(*x.shape[:-2], -1, samples, x.shape[-1])
            return x[..., jnp.arange(len(best)), best, :]

        return Decoded.of(
            keep(final),
            batch,
            vocabulary,
            scores=jnp.min(scores.reshape(-1, samples), axis=-1),
            steps=jnp.int32(self.num_steps),
            row_steps=jnp.where(jnp.any(batch.target_mask, axis=-1), self.num_steps, 0),
            written_at=jnp.where(batch.target_mask, self.num_steps - 1, -1),
            trace=jax.tree.map(keep, history),
        )
