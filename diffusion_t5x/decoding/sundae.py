"""SUNDAE decoding: denoise whole canvases of random tokens, many at once, and keep the best."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.commit import choose
from diffusion_t5x.decoding.decoder import Decoded, Decoder, Watch, Written, start_trace
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.layers import fold_in
from diffusion_t5x.models.masks import BIDIRECTIONAL
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.sampling import Sampling, forbid, sample, uniform
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.objectives.objective import cross_entropy, row_keys
from diffusion_t5x.objectives.reading import Reading


@dataclasses.dataclass(frozen=True)
class SundaeDecoder(Decoder):
    """Denoises `num_samples` canvases of uniform noise for `num_steps` steps and keeps each example's best.

    The score is the cross-entropy, in nats a target position, between the canvas that the last step reads and the
    logits that it gives: how little the model still wants to change ("model score", arXiv 2401.17181 section 3).
    Lower is better; it is no log-probability.

    The defaults are paper 1's. The rest is SUNDAE's own (arXiv 2112.06749, its section on sampling).

    Attributes:
      num_steps: at most so many steps. A step is one pass of the model, an unroll too.
      num_samples: canvases for each example.
      temperature: at which every step samples what it writes; 0 takes the likeliest.
      method: "sample": every step writes `update_share` of the targets, chosen at random. "argmax_unrolled": steps take
        turns. One writes the likeliest token at all targets; the next, the unroll, reads that and writes anew, with
        its own likeliest tokens, only the `update_share` of them that the one before was least sure of. Nothing is
        drawn, so the temperature must be 0.
      update_share: in (0, 1], of each row's targets; rounded, at least one. A target that no step chose stays noise.
      stop_when_unchanged: a canvas is finished after a step that would have changed nothing had it written all targets,
        and its score is of that step; decoding stops when all are. At temperature 0 the result is the same, in less
        steps.
    """

    num_steps: int = 10
    num_samples: int = 8
    temperature: float = 0.2
    method: Literal["sample", "argmax_unrolled"] = "sample"
    update_share: float = 1.0
    stop_when_unchanged: bool = False

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.num_samples < 1 or self.temperature < 0:
            raise UserError(
                f"SundaeDecoder needs num_steps and num_samples of at least 1 and a temperature of at least 0; "
                f"got {self}."
            )
        if not 0 < self.update_share <= 1:
            raise UserError(f"SundaeDecoder.update_share must lie in (0, 1]; got {self.update_share}.")
        if self.method not in ("sample", "argmax_unrolled"):
            raise UserError(f"SundaeDecoder.method must be 'sample' or 'argmax_unrolled', not {self.method!r}.")
        if self.method == "argmax_unrolled" and self.temperature:
            raise UserError(
                f"SundaeDecoder.method 'argmax_unrolled' takes the likeliest tokens: it needs temperature = 0, not "
                f"{self.temperature}."
            )

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (Mode.of(BIDIRECTIONAL, "uniform"),)

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
        """One step of a block; see `InnerDecoder.write`.

        The score is the sum of the log-probabilities of the tokens that the last step reads, and 0 before.
        """
        written, _ = self._denoise(model, hidden, canvas, eligible, positions, keys, step)
        return written.replace(score=jnp.where(step == self.num_steps - 1, written.score, 0))

    def _denoise(self, model, hidden, canvas, eligible, positions, keys, step, before=None):
        """What a step writes, its score that of the tokens it reads; and per row, whether it would change nothing.

        `before` are the log-probabilities of what the step before wrote.
        """
        keys_of_step = fold_in(keys, step)

        def read_out(logits, tokens, positions):
            logits = forbid(logits, model.vocabulary)
            wish, _ = cross_entropy(logits, tokens)
            proposed = sample(logits, keys_of_step, positions, Sampling(self.temperature))
            return proposed, cross_entropy(logits, proposed)[1], wish

        tokens, surprise, wish = model.map_logits(read_out, hidden, canvas, positions)
        chosen = eligible
        if self.update_share < 1:
            count = jnp.maximum(jnp.round(self.update_share * jnp.sum(eligible, axis=-1)), 1)
            if self.method == "sample":  # steps draw from the numbers up to num_steps, the noise from that one
                order = uniform(fold_in(keys, self.num_steps + 1 + step), positions)
                chosen = choose(order, eligible, count)
            else:
                chosen = jnp.where(step % 2 == 0, eligible, choose(-before, eligible, count))
        written = Written(
            tokens=jnp.where(chosen, tokens, canvas),
            mask=chosen,
            log_probability=-surprise,
            score=-jnp.sum(jnp.where(eligible, wish, 0), axis=-1),
        )
        return written, jnp.all((tokens == canvas) | ~eligible, axis=-1)

    def decode(self, model: Transformer, batch: Batch, key: jax.Array, trace: bool | Watch = False) -> Decoded:
        vocabulary, samples = model.vocabulary, self.num_samples
        example_keys = row_keys(key, batch.example_ids)
        keys = jax.vmap(lambda k: jax.vmap(lambda n: jax.random.fold_in(k, n))(jnp.arange(samples)))(example_keys)
        keys = keys.reshape(-1)  # rows: example by example, each one's samples together
        rows = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), batch)
        reading = Reading.of(rows, vocabulary, model.config.shifted)
        encoded = model.encode(batch)
        encoded = encoded and encoded.repeat(samples)

        def unfinished(carry):
            return (carry["step"] < self.num_steps) & ~jnp.all(carry["finished"])

        def denoise(carry):
            step, canvas, finished = carry["step"], carry["canvas"], carry["finished"]
            eligible = rows.target_mask & ~finished[:, None]
            hidden = reading.hidden(model, canvas, BIDIRECTIONAL, encoded)
            written, unchanged = self._denoise(
                model, hidden, canvas, eligible, rows.positions, keys, step, carry["log_probability"]
            )
            if trace:
                carry["trace"] = carry["trace"].record(step, written.tokens, written.mask, written.log_probability)
            return carry | {
                "step": step + 1,
                "canvas": written.tokens,
                "log_probability": written.log_probability,
                "score": jnp.where(finished, carry["score"], written.score),
                "row_steps": carry["row_steps"] + ~finished,
                "written_at": jnp.where(written.mask, step, carry["written_at"]),
                "finished": finished | unchanged if self.stop_when_unchanged else finished,
            }

        noise = self.blank(rows, vocabulary, keys)
        num_targets = jnp.sum(rows.target_mask, axis=-1)
        carry = {
            "step": 0,
            "canvas": noise,
            "log_probability": jnp.zeros(noise.shape),
            "score": jnp.zeros(len(noise)),
            "row_steps": jnp.zeros(len(noise), jnp.int32),
            "written_at": jnp.full_like(noise, -1),
            "finished": num_targets == 0,
            "trace": start_trace(trace, noise, self.num_steps),
        }
        carry = jax.lax.while_loop(unfinished, denoise, carry)
        scores = (-carry["score"] / jnp.maximum(num_targets, 1)).reshape(-1, samples)
        best = jnp.argmin(scores, axis=-1)

        def keep(x):  # [..., B * samples, L] -> [..., B, L]
            x = x.reshape(*x.shape[:-2], -1, samples, x.shape[-1])
            return x[..., jnp.arange(len(best)), best, :]

        history = carry["trace"] and carry["trace"].end(carry["step"])
        return Decoded.of(
            keep(carry["canvas"]),
            batch,
            vocabulary,
            scores=jnp.min(scores, axis=-1),
            steps=jnp.asarray(carry["step"]),
            row_steps=jnp.max(carry["row_steps"].reshape(-1, samples), axis=-1),
            written_at=keep(carry["written_at"]),
            trace=jax.tree.map(keep, history),
        )
