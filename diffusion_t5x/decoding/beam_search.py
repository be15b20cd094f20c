"""Beam search of an autoregressive model, as in T5X."""

import dataclasses
from typing import Any, ClassVar, Self

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import after_end
from diffusion_t5x.decoding.autoregressive import read_next, read_prompt
from diffusion_t5x.decoding.decoder import Decoded, Decoder, Watch, start_trace, target_range
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.attention import KVCache
from diffusion_t5x.models.modes import LeftToRight
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import BoolB, IntB, IntBL, KeyScalar


class Beams(flax.struct.PyTreeNode):
    """Several texts per example, best first, or one without a beam axis.

    Attributes:
      tokens: rows like the batch's.
      log_probability: of every token that was written, -inf elsewhere; None if not traced.
      score: -inf if there is no text.
    """

    tokens: Int[jax.Array, "batch *beams length"]
    log_probability: Float[jax.Array, "batch *beams length"] | None
    score: Float[jax.Array, " batch *beams"]

    def take(self, index: Int[jax.Array, "batch taken"]) -> Self:
        """Selects texts by index."""
        return jax.tree.map(lambda x: jnp.take_along_axis(x, index if x.ndim == 2 else index[..., None], axis=1), self)

    def write(
        self,
        slot: IntB,
        token: Int[jax.Array, "batch beams"],
        log_probability: Float[jax.Array, "batch beams"],
        score: Float[jax.Array, "batch beams"],
    ) -> Self:
        """Returns the beams with one more token in each example's slot."""
        here = jnp.arange(self.tokens.shape[-1]) == slot[:, None, None]
        all_before = self.log_probability
        return self.replace(
            tokens=jnp.where(here, token[..., None], self.tokens),
            log_probability=None if all_before is None else jnp.where(here, log_probability[..., None], all_before),
            score=score,
        )


@dataclasses.dataclass(frozen=True)
class BeamSearchDecoder(LeftToRight, Decoder):
    """Beam search: writes the text with the highest score among those that `num_beams` beams find.

    A text's score is its log-probability, up to and including the EOS or pad that ends it, divided by
    `((5 + length) / 6) ** length_penalty` (arXiv 1609.08144, section 7; length in tokens, including
    the last one). Higher is better.

    As in T5X, each step extends the live beams by one token. Of the `2 * num_beams` most likely extensions, those that
    end a text compete for the `num_beams` finished texts, and the most likely of the others stay alive. An example is
    done when no live beam can still beat the worst of its finished texts, or when its canvas ends. If it has finished
    none by then, its output is the most likely live beam.

    Attributes:
      num_beams: number of beams per example; one beam is greedy, except that it prefers a text that ends earlier if
        that scores higher.
      length_penalty: 0 means none; greater values favour longer texts.
      prefix: the model was trained with bidirectional attention over the inputs.
    """

    autoregressive: ClassVar[bool] = True
    left_to_right: ClassVar[bool] = True

    num_beams: int = 4
    length_penalty: float = 0.6
    prefix: bool = False

    def __post_init__(self) -> None:
        if self.num_beams < 1 or self.length_penalty < 0:
            raise UserError(
                f"BeamSearchDecoder needs num_beams of at least 1 and a length_penalty of at least 0; got {self}."
            )

    def decode(self, model: Transformer, batch: Batch, key: KeyScalar, trace: bool | Watch = False) -> Decoded:
        """Deterministic. The trace shows the most likely live beam and, once an example is done, its output."""
        vocabulary, beams = model.vocabulary, self.num_beams
        rows, length = batch.tokens.shape
        first_target, num_targets = target_range(batch.target_mask)

        # An example's inputs are read once; its beams are neighbours in the cache.
        encoded = model.encode(batch)
        canvas, cache = read_prompt(model, batch, self.attention, encoded)
        cache = cache.take(jnp.repeat(jnp.arange(rows), beams))
        encoded = encoded and encoded.repeat(beams)

        def output(carry):
            """Returns the best text of each example, `[B, ...]`."""
            finished, live = (jax.tree.map(lambda x: x[:, 0], carry[name]) for name in ("finished", "live"))
            live = live.replace(score=live.score / self._penalty(carry["row_steps"]))
            return select(finished.score > -jnp.inf, finished, live)

        def unfinished(carry):
            return ~jnp.all(carry["done"])

        def write_next(carry):
            step, live, done = carry["step"], carry["live"], carry["done"]
            slot = jnp.minimum(first_target + step, length - 1)
            logits, cache = read_next(
                model, live.tokens.reshape(-1, length), carry["cache"], jnp.repeat(slot, beams), self.attention, encoded
            )
            log_probability = jax.nn.log_softmax(logits)
            size = log_probability.shape[-1]
            scores = live.score[..., None] + log_probability.reshape(rows, beams, size)
            score, index = jax.lax.top_k(scores.reshape(rows, -1), 2 * beams)
            beam, token = index // size, index % size
            of_token = jnp.take_along_axis(log_probability.reshape(rows, -1), index, axis=-1)
            candidates = live.take(beam).write(slot, token, of_token, score)

            ends = vocabulary.is_end(token)
            ended = candidates.replace(score=jnp.where(ends, score / self._penalty(step + 1), -jnp.inf))
            finished = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), carry["finished"], ended)
            finished = finished.take(jax.lax.top_k(finished.score, beams)[1])
            candidates = candidates.replace(score=jnp.where(ends, -jnp.inf, score))
            goes_on = jax.lax.top_k(candidates.score, beams)[1]
            parent = jnp.arange(rows)[:, None] * beams + jnp.take_along_axis(beam, goes_on, axis=-1)

            # A live beam's log-probability only falls, and counts for most at the greatest length.
            best_possible = jnp.max(candidates.score, axis=-1) / self._penalty(num_targets)
            carry |= {
                "step": step + 1,
                "cache": cache.take(parent.reshape(-1)),
                "live": select(done, live, candidates.take(goes_on)),
                "finished": select(done, carry["finished"], finished),
                "row_steps": carry["row_steps"] + ~done,
                "done": done | (step + 1 >= num_targets) | (finished.score[:, -1] >= best_possible),
            }
            if trace:
                shown = jax.tree.map(lambda x: x[:, 0], carry["live"])
                shown = select(carry["done"], output(carry), shown)
                carry["trace"] = carry["trace"].record(step, shown.tokens, batch.target_mask, shown.log_probability)
            return carry

        carry = self._start(canvas, cache, num_targets, trace)
        carry = jax.lax.while_loop(unfinished, write_next, carry)
        best = output(carry)
        written = batch.target_mask & ~after_end(best.tokens, batch, vocabulary)
        return Decoded.of(
            best.tokens,
            batch,
            vocabulary,
            scores=best.score,
            steps=carry["step"],
            row_steps=carry["row_steps"],
            written_at=jnp.where(written, jnp.arange(length, dtype=jnp.int32) - first_target[:, None], -1),
            trace=carry["trace"] and carry["trace"].end(carry["step"]),
        )

    def _start(self, canvas: IntBL, cache: KVCache, num_targets: IntB, trace: bool | Watch) -> dict[str, Any]:
        """Returns the loop's state before its first step."""
        copies = jnp.repeat(canvas[:, None], self.num_beams, axis=1)
        nothing = Beams(
            tokens=copies,
            log_probability=jnp.full(copies.shape, -jnp.inf, jnp.float32) if trace else None,
            score=jnp.full(copies.shape[:2], -jnp.inf, jnp.float32),
        )
        return {
            "step": jnp.int32(0),
            "cache": cache,
            "live": nothing.replace(score=nothing.score.at[:, 0].set(0)),  # else all would be the same
            "finished": nothing,
            "row_steps": jnp.zeros_like(num_targets),
            "done": num_targets == 0,
            "trace": start_trace(trace, canvas, canvas.shape[1]),
        }

    def _penalty(self, num_tokens: Int[jax.Array, "..."]) -> Float[jax.Array, "..."]:
        return ((5 + num_tokens) / 6) ** self.length_penalty


def select(condition: BoolB, first: Beams, second: Beams) -> Beams:
    """Selects, per example, the first texts if the condition holds, otherwise the second ones."""
    return jax.tree.map(lambda x, y: jnp.where(condition.reshape(-1, *[1] * (x.ndim - 1)), x, y), first, second)
