"""Decoding in windows over a stale cache, for models whose tokens all see each other (Fast-dLLM, arXiv 2505.22618)."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.canvas import Canvas, StepRule, Written, denoise
from diffusion_t5x.decoding.decoder import Decoded, Decoder, Watch, start_trace
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.rows import end_rows, start_row
from diffusion_t5x.decoding.stale_cache import Cached, StaleReader
from diffusion_t5x.errors import UserError, check_choices
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.slots import put_slots, slots_where, take_slots
from diffusion_t5x.models.streams import row_keys
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import BoolBL, FloatBLD, IntB1, IntBL, KeyB, KeyScalar


@dataclasses.dataclass(frozen=True)
class WindowDecoder(Decoder):
    """Writes windows of targets one after another, reading only a window over cached keys and values of the rest.

    The first step of a window reads the whole rows. Later steps read the window, and reuse the keys and values of all
    other slots from that step, though what these attend to has changed. So a text differs from one without a cache
    (`MaskedDecoder.window`), but less so the more often rows are read whole; if they are at every step, it is the same.
    The score is the inner decoder's, averaged over the targets. Rows wait for each other at the end of a window.

    A shifted model (`ModelConfig.shifted`) predicts a window's first target in the slot before the window, so from the
    last pass over the whole row.

    With n windows of S steps, P inputs and T targets, a text takes n (F(P + T) + (S - 1) F(q)) FLOPs, where F(q) is
    `performance.model_flops.forward_flops(config, q, keys=P + T, predicted=window)` and q is `window` for "dual" and,
    for "prefix", what is left of T, rounded up to `window` times a power of 2. Without a cache it takes n S F(P + T),
    with the logits of all slots.

    Attributes:
      window: targets in a window, counted from the first target.
      inner: how a window is written; its `num_steps` are those of a window. Its guidance reads the rows twice.
      cached: "prefix": what comes before the window; what comes after it is read with it. "dual": both.
      refresh_every: steps of a window after which the rows are read whole again; None: only at its first step.
      refresh_drift: a row is read whole if the hidden states of the window's unchanged tokens have changed by this
        much since it last was: mean of 1 - cosine, from 0 (at every step) to 2. That costs one more pass over the
        window. None: never for that reason.
      first_alone: a window's first step writes only the first target, as Fast-dLLM does for shifted models.
    """

    fills_holes: ClassVar[bool] = True

    window: int = 32
    inner: StepRule = MaskedDecoder(None, threshold=0.9, threshold_included=True)  # noqa: RUF009  (frozen)
    cached: Cached = "dual"
    refresh_every: int | None = None
    refresh_drift: float | None = None
    first_alone: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        if self.window < 1:
            raise UserError(f"WindowDecoder.window must be at least 1; got {self.window}.")
        if self.refresh_every is not None and self.refresh_every < 1:
            raise UserError(f"WindowDecoder.refresh_every must be at least 1, or None; got {self.refresh_every}.")
        if self.refresh_drift is not None and not 0 <= self.refresh_drift <= 2:
            raise UserError(f"WindowDecoder.refresh_drift must lie in [0, 2], or be None; got {self.refresh_drift}.")
        if self.inner.num_samples != 1:
            raise UserError(
                f"WindowDecoder.inner must have num_samples = 1: a window is written once; got {self.inner}."
            )
        if self.first_alone and not self.inner.keeps_written:
            raise UserError(
                f"WindowDecoder.first_alone must be False for an inner decoder that rewrites tokens; got {self.inner}."
            )

    @property
    def modes(self) -> tuple[Mode, ...]:
        return self.inner.modes

    def decode(self, model: Transformer, batch: Batch, key: KeyScalar, trace: bool | Watch = False) -> Decoded:
        vocabulary, target_mask = model.vocabulary, jnp.asarray(batch.target_mask)
        keys = row_keys(key, batch.example_ids)
        length = target_mask.shape[1]
        size = min(self.window, length)
        rule = _FirstAlone(self.inner, guidance=self.inner.guidance) if self.first_alone else self.inner
        reader = StaleReader.of(model, batch, rule, size, self.cached, self.refresh_every, self.refresh_drift)
        canvas = self.inner.blank(batch, vocabulary, keys)
        number = (jnp.cumsum(target_mask, axis=-1) - 1) // size
        num_targets = jnp.sum(target_mask, axis=-1)

        def write_window(carry):
            slots = slots_where(target_mask & (number == carry["window"]), size)

            def whole(tokens, carry):
                return put_slots(carry["canvas"], slots, tokens)

            def read(tokens, carry):
                states, memory = reader.read(whole(tokens, carry), carry["window"], carry["memory"])
                return take_slots(states, slots), carry | {"memory": memory}

            def show(carry, written):
                history = carry["trace"]
                if history is not None:
                    blank = jnp.zeros((len(slots), length), bool)
                    mask = put_slots(blank, slots, written.mask)
                    log_probability = put_slots(blank.astype(jnp.float32), slots, written.log_probability)
                    history = history.record(carry["steps"], whole(written.tokens, carry), mask, log_probability)
                return carry | {"trace": history, "steps": carry["steps"] + 1}

            window = Canvas.start(take_slots(carry["canvas"], slots), slots < length, carry["score"])
            positions = take_slots(batch.positions, slots)
            window, carry = denoise(rule, model, window, positions, keys, read, show, carry)
            written_at = jnp.where(window.written_at < 0, -1, window.written_at + carry["row_steps"][:, None])
            return carry | {
                "window": carry["window"] + 1,
                "memory": carry["memory"].replace(age=jnp.int32(0)),
                "canvas": whole(window.tokens, carry),
                "written_at": put_slots(carry["written_at"], slots, written_at),
                "score": window.score,
                "row_steps": carry["row_steps"] + window.row_steps,
            }

        most_steps = -(-length // size) * (size if self.first_alone else self.inner.most_steps(size))
        carry = {
            **start_row(batch, keys, None, canvas, start_trace(trace, canvas, most_steps)),
            "window": jnp.int32(0),
            "memory": reader.start(),
        }
        carry = jax.lax.while_loop(lambda carry: jnp.any(carry["window"] * size < num_targets), write_window, carry)
        decoded = end_rows(carry, vocabulary)
        return decoded.replace(scores=decoded.scores / jnp.maximum(num_targets, 1))


@dataclasses.dataclass(frozen=True)
class _FirstAlone(StepRule):
    """A rule whose first step writes only the first eligible target."""

    inner: StepRule
    guidance: float = 0.0

    def blank(self, batch: Batch, vocabulary: TokenIds, keys: KeyB) -> IntBL:
        return self.inner.blank(batch, vocabulary, keys)

    def eligible(self, tokens: IntBL, target_mask: BoolBL, vocabulary: TokenIds, step: IntB1) -> BoolBL:
        eligible = self.inner.eligible(tokens, target_mask, vocabulary, step)
        return eligible & ((step > 0) | (jnp.cumsum(eligible, axis=-1) == 1))

    def most_steps(self, num_targets: int) -> int:
        return num_targets

    def start_memory(self, model: Transformer, tokens: IntBL) -> Any:
        return self.inner.start_memory(model, tokens)

    def write(
        self, model: Transformer, hidden: FloatBLD, canvas: Canvas, eligible: BoolBL, positions: IntBL, keys: KeyB
    ) -> Written:
        return self.inner.write(model, hidden, canvas, eligible, positions, keys)
