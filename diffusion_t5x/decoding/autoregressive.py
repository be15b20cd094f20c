"""Autoregressive decoding, token by token, over a cache of keys and values."""

import dataclasses
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Float

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.decoding.allowed_texts import Span
from diffusion_t5x.decoding.decoder import Decoded, Decoder, Watch, start_trace, target_range
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.models.attention import KVCache, write_rows
from diffusion_t5x.models.masks import AttentionKind
from diffusion_t5x.models.modes import LeftToRight
from diffusion_t5x.models.reading import shift_right, shifted_slots
from diffusion_t5x.models.sampling import Sampling, forbid, sample
from diffusion_t5x.models.stack import Encoded
from diffusion_t5x.models.streams import row_keys
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import IntB, IntBL, KeyScalar


def read_prompt(
    model: Transformer, batch: Batch, kind: AttentionKind, encoded: Encoded | None
) -> tuple[IntBL, KVCache]:
    """Returns the rows with pad for targets, and a cache with their inputs, read in one pass.

    The pass fills the slots of the targets too, but no query sees those before they are written again.
    """
    canvas = jnp.where(batch.target_mask, model.vocabulary.pad_id, batch.tokens)
    prompt = shift_right(canvas, batch.positions, model.vocabulary.start_id)
    cache = KVCache.empty(model.config, shifted_slots(batch, model.vocabulary))
    _, cache = model.extend(prompt, kind, cache, jnp.zeros(len(canvas), jnp.int32), encoded)
    return canvas, cache


def read_next(
    model: Transformer, canvas: IntBL, cache: KVCache, slot: IntB, kind: AttentionKind, encoded: Encoded | None
) -> tuple[Float[jax.Array, "batch vocab"], KVCache]:
    """Reads each row's `slot`; returns its logits, and the cache with one token more."""
    before = canvas[jnp.arange(len(canvas)), slot - 1]
    before = jnp.where(slot == 0, model.vocabulary.start_id, before)
    hidden, cache = model.extend(before[:, None], kind, cache, slot, encoded)
    return forbid(model.logits(hidden), model.vocabulary)[:, 0], cache


@dataclasses.dataclass(frozen=True)
class AutoregressiveDecoder(LeftToRight, Decoder):
    """Greedy decoding, or sampling with temperature, top-k and top-p.

    The score is the log-probability of the output up to and including EOS under the model at temperature 1: higher
    is better.

    Attributes:
      temperature: 0 is greedy.
      top_k, top_p: see `Sampling`.
      prefix: the model was trained with bidirectional attention over the inputs.
      language: what it may write, by `within`: of the tokens after which a text of the language still fits, each is
        chosen as if there were no others. Scores stay those of the model.
    """

    autoregressive: ClassVar[bool] = True
    left_to_right: ClassVar[bool] = True

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    prefix: bool = False
    language: Language | None = None

    def __post_init__(self) -> None:
        Sampling(self.temperature, self.top_k, self.top_p)  # raises on bad values now, not in the middle of a run

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    def within(self, language: Language) -> Self:
        return dataclasses.replace(self, language=language)

    def decode(self, model: Transformer, batch: Batch, key: KeyScalar, trace: bool | Watch = False) -> Decoded:
        vocabulary, length = model.vocabulary, batch.tokens.shape[1]
        keys = row_keys(key, batch.example_ids)
        rows = jnp.arange(batch.tokens.shape[0])
        first_target, num_targets = target_range(batch.target_mask)
        is_last = batch.target_mask & ~jnp.pad(batch.target_mask[:, 1:], ((0, 0), (0, 1)))
        encoded = model.encode(batch)
        canvas, cache = read_prompt(model, batch, self.attention, encoded)

        def unfinished(carry):
            step, _, _, finished, *_ = carry
            return (step < length) & ~jnp.all(finished)

        def write_next(carry):
            step, canvas, cache, finished, scores, written, history, text = carry
            slot = jnp.minimum(first_target + step, length - 1)
            logits, cache = read_next(model, canvas, cache, slot, self.attention, encoded)
            step_of_row = jnp.broadcast_to(step, (len(rows), 1))
            allowed = logits if text is None else text.only_fitting(self.language, logits, num_targets - step - 1)
            token = sample(allowed[:, None], keys, step_of_row, self.sampling)[:, 0]
            token = jnp.where(finished, canvas[rows, slot], token)
            log_probability = jax.nn.log_softmax(logits)[rows, token]
            scores += jnp.where(finished, 0, log_probability)
            canvas = write_rows(canvas, token[:, None], slot)
            if trace:
                here = (jnp.arange(length) == slot[:, None]) & ~finished[:, None]
                history = history.record(step, canvas, here, log_probability[:, None])
            text = text and text.advance(self.language, token[:, None], ~finished[:, None])
            written += ~finished
            # A row is done after EOS (or pad), and where its canvas ends.
            finished |= vocabulary.is_end(token) | is_last[rows, slot]
            return step + 1, canvas, cache, finished, scores, written, history, text

        finished = num_targets == 0
        history = start_trace(trace, canvas, length)
        scores = jnp.zeros(len(rows), jnp.float32)
        text = self.language and Span.whole(self.language, len(rows))
        carry = (jnp.int32(0), canvas, cache, finished, scores, jnp.zeros_like(first_target), history, text)
        steps, canvas, _, _, scores, written, history, _ = jax.lax.while_loop(unfinished, write_next, carry)
        step_of_slot = jnp.arange(length, dtype=jnp.int32) - first_target[:, None]
        is_written = batch.target_mask & (step_of_slot < written[:, None])
        return Decoded.of(
            canvas,
            batch,
            vocabulary,
            scores=scores,
            steps=steps,
            row_steps=written,
            written_at=jnp.where(is_written, step_of_slot, -1),
            trace=None if history is None else history.end(steps),
        )
