"""Autoregressive decoding, token by token, over a cache of keys and values."""

import dataclasses
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
from jaxtyping import Float

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.allowed_texts import Span
from diffusion_t5x.decoding.decoder import Decoded, Watch, start_trace, target_range
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.decoding.rows import Carry, RowDecoder, end_rows, read_inputs, show_rows, start_row
from diffusion_t5x.models.attention import KVCache, write_rows
from diffusion_t5x.models.masks import AttentionKind
from diffusion_t5x.models.modes import LeftToRight
from diffusion_t5x.models.reading import shift_right, shifted_slots
from diffusion_t5x.models.sampling import Sampling, forbid, sample
from diffusion_t5x.models.stack import Encoded
from diffusion_t5x.models.streams import row_keys
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import IntB, IntBL, KeyB, KeyScalar


def read_prompt(
    model: Transformer, batch: Batch, kind: AttentionKind, encoded: Encoded | None, piece: int | None = None
) -> tuple[IntBL, KVCache]:
    """Returns the rows with pad for targets, and a cache with their inputs; for `piece`, see `read_inputs`."""
    canvas = jnp.where(batch.target_mask, model.vocabulary.pad_id, batch.tokens)
    prompt = shift_right(canvas, batch.positions, model.vocabulary.start_id)
    cache = KVCache.empty(model.config, shifted_slots(batch, model.vocabulary))
    _, cache = read_inputs(model, prompt, kind, cache, target_range(batch.target_mask)[0], encoded, piece)
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
class AutoregressiveDecoder(LeftToRight, RowDecoder):
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
    stride: ClassVar[int] = 4

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    prefix: bool = False
    language: Language | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        Sampling(self.temperature, self.top_k, self.top_p)  # raises on bad values now, not in the middle of a run

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    @property
    def samples_model(self) -> bool:
        return self.sampling == Sampling(1.0) and self.language is None

    def within(self, language: Language) -> Self:
        return dataclasses.replace(self, language=language)

    def start(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar | KeyB,
        trace: bool | Watch = False,
        piece: int | None = None,
    ) -> Carry:
        encoded = model.encode(batch)
        canvas, cache = read_prompt(model, batch, self.attention, encoded, piece)
        history = start_trace(trace, canvas, canvas.shape[1])
        return {
            **start_row(batch, row_keys(key, batch.example_ids), encoded, canvas, history),
            "first_target": target_range(batch.target_mask)[0],
            "cache": cache,
            "log_probability": jnp.zeros(canvas.shape, jnp.float32),
            "text": self.language and Span.whole(self.language, len(canvas)),
        }

    def advance(self, model: Transformer, carry: Carry) -> Carry:
        """Writes a token of each row."""
        canvas, finished, step = carry["canvas"], carry["finished"], carry["row_steps"]
        rows, target_mask = jnp.arange(len(canvas)), carry["batch"].target_mask
        slot = jnp.minimum(carry["first_target"] + step, canvas.shape[1] - 1)
        logits, cache = read_next(model, canvas, carry["cache"], slot, self.attention, carry["encoded"])
        text, allowed = carry["text"], logits
        if text is not None:
            allowed = text.only_fitting(self.language, logits, target_range(target_mask)[1] - step - 1)
        token = sample(allowed[:, None], carry["keys"], step[:, None], self.sampling)[:, 0]
        token = jnp.where(finished, canvas[rows, slot], token)
        log_probability = jax.nn.log_softmax(logits)[rows, token]
        carry = show_rows(carry, slot, token[:, None], ~finished[:, None], log_probability[:, None])
        written_at = jnp.where(finished, carry["written_at"][rows, slot], step)
        kept = jnp.where(finished, carry["log_probability"][rows, slot], log_probability)
        # A row is done after EOS (or pad), and where its canvas ends.
        is_last = ~jnp.pad(target_mask, ((0, 0), (0, 1)))[rows, slot + 1]
        return carry | {
            "canvas": write_rows(canvas, token[:, None], slot),
            "cache": cache,
            "score": carry["score"] + jnp.where(finished, 0, log_probability),
            "written_at": write_rows(carry["written_at"], written_at[:, None], slot),
            "log_probability": write_rows(carry["log_probability"], kept[:, None], slot),
            "row_steps": step + ~finished,
            "finished": finished | model.vocabulary.is_end(token) | is_last,
            "text": text and text.advance(self.language, token[:, None], ~finished[:, None]),
        }

    def finish(self, vocabulary: TokenIds, carry: Carry) -> Decoded:
        return end_rows(carry, vocabulary).replace(log_probability=carry["log_probability"])
