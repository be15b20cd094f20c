"""The loop of all denoising decoders.

A `StepRule` defines what one step may write, and writes it. Alone it decodes whole rows; `BlockDecoder` and
`SelfSpeculationDecoder` run it over blocks, and `WindowDecoder` over windows, which they read through a cache.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, Self

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.allowed_texts import Span
from diffusion_t5x.decoding.decoder import Decoded, Watch, start_trace
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.decoding.rows import Carry, RowDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.layers import fold_in
from diffusion_t5x.models.masks import BIDIRECTIONAL
from diffusion_t5x.models.reading import Reading
from diffusion_t5x.models.slots import take_slots
from diffusion_t5x.models.stack import Encoded
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import BoolB, BoolBL, FloatB, FloatBL, FloatBLD, IntB, IntB1, IntBL, KeyB, KeyScalar


class Written(flax.struct.PyTreeNode):
    """The output of one step.

    Attributes:
      tokens: the rows after the step.
      mask: the positions that it wrote, even if the token is the same.
      log_probability: of the written tokens, at temperature 1 over all ids that may be written.
      score: added to the row's score, a sum over targets: higher is better.
      source: the slot that each slot's content was in before, L for none; None: all stay in place.
      finished: rows that need no more steps even if positions are eligible; None: no row.
      memory: what the rule keeps for its next step; see `StepRule.start_memory`.
    """

    tokens: IntBL
    mask: BoolBL
    log_probability: FloatBL
    score: FloatB
    source: IntBL | None = None
    finished: BoolB | None = None
    memory: Any = None


class Canvas(flax.struct.PyTreeNode):
    """Rows, or a block of each, between two steps.

    Attributes:
      step: number of steps that a row has taken.
      tokens: as they are.
      target_mask: what is to be written.
      log_probability: of each token in the step that wrote it; 0 where none has.
      written_at: that step, counted from 0; -1 where none has.
      score: of the row so far.
      row_steps: steps that a row took part in.
      finished: rows that take no more steps.
      memory: what the rule has kept from the step before.
      span: where a block is in its text, for a rule with a language; None: the rows are whole.
    """

    step: IntB1
    tokens: IntBL
    target_mask: BoolBL
    log_probability: FloatBL
    written_at: IntBL
    score: FloatB
    row_steps: IntB
    finished: BoolB
    memory: Any = None
    span: Span | None = None

    @classmethod
    def start(cls, tokens: IntBL, target_mask: BoolBL, score: FloatB | None = None, span: Span | None = None) -> Self:
        """Before the first step, with a score that steps add to; None is 0."""
        rows = len(tokens)
        return cls(
            step=jnp.zeros((rows, 1), jnp.int32),
            tokens=tokens,
            target_mask=target_mask,
            log_probability=jnp.zeros(tokens.shape, jnp.float32),
            written_at=jnp.full(tokens.shape, -1, jnp.int32),
            score=jnp.zeros(rows, jnp.float32) if score is None else score,
            row_steps=jnp.zeros(rows, jnp.int32),
            finished=jnp.zeros(rows, bool),
            span=span,
        )

    def after(self, written: Written, takes_part: BoolB) -> Self:
        """Returns the state after one more step, in which these rows took part."""
        log_probability, written_at = self.log_probability, self.written_at
        if written.source is not None:
            log_probability = take_slots(log_probability, written.source)
            written_at = take_slots(written_at + 1, written.source) - 1
        return self.replace(
            step=self.step + 1,
            tokens=written.tokens,
            log_probability=jnp.where(written.mask, written.log_probability, log_probability),
            written_at=jnp.where(written.mask, self.step, written_at),
            score=self.score + written.score,
            row_steps=self.row_steps + takes_part,
            finished=self.finished if written.finished is None else self.finished | (written.finished & takes_part),
            memory=written.memory,
        )


class StepRule(RowDecoder, Protocol):
    """A frozen dataclass that defines what one denoising step may write, and writes it.

    On its own it decodes whole canvases, each target seeing all others; `BlockDecoder` writes blocks with it. Random
    draws at a position depend only on the row's key, the step and the position's number.

    Attributes:
      keeps_written: a target is MASK until a step writes it, and keeps what that step wrote.
      num_samples: canvases for each example, of which the one of best score is kept.
      guidance: g of classifier-free guidance (arXiv 2207.12598): each step reads the canvas once more with all inputs
        masked, and its logits are `u + (1 + g) (c - u)` of those without inputs, u, and with them, c. 0 reads once.
      language: what it may write; None: any text. See `Decoder.within`.
    """

    fills_holes: ClassVar[bool] = True
    in_order: ClassVar[bool] = False
    keeps_written: ClassVar[bool] = False
    num_samples: int = 1
    guidance: float = 0.0
    language: Language | None = None

    def blank(self, batch: Batch, vocabulary: TokenIds, keys: KeyB) -> IntBL:
        """Returns the rows with the targets as they are before the first step."""

    def eligible(self, tokens: IntBL, target_mask: BoolBL, vocabulary: TokenIds, step: IntB1) -> BoolBL:
        """Returns the targets that a step may write. A row without any is done."""

    def most_steps(self, num_targets: int) -> int:
        """Returns the maximum number of steps for `num_targets` targets."""

    def start_memory(self, model: Transformer, tokens: IntBL) -> Any:
        """Returns what the rule keeps from step to step, before the first one: any arrays. None keeps nothing."""
        return None

    def read(self, model: Transformer, inputs: "CanvasInputs", tokens: IntBL, rows: Batch) -> FloatBLD:
        """Returns the hidden states that predict the tokens of whole rows."""
        return inputs.read(self, model, tokens, rows)

    def write(
        self,
        model: Transformer,
        hidden: FloatBLD,
        canvas: Canvas,
        eligible: BoolBL,
        positions: IntBL,
        keys: KeyB,
    ) -> Written:
        """Takes one step.

        Args:
          model: computes the logits.
          hidden: hidden states of the canvas.
          canvas: the canvas before this step.
          eligible: the positions that may be written.
          positions: of the slots in their segments.
          keys: a key for each row and step, a source of named streams (see `models.streams`).
        """

    def start(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar | KeyB,
        trace: bool | Watch = False,
        piece: int | None = None,
    ) -> Carry:
        """Each example's canvases stand together; every step reads the inputs anew, hence not in pieces."""
        samples, keys = self.num_samples, row_keys(key, batch.example_ids)
        rows = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), batch)
        if samples > 1:
            numbers = jnp.tile(jnp.arange(samples), len(batch.tokens))
            others = jax.vmap(jax.random.fold_in)(jnp.repeat(stream(keys, "samples"), samples), numbers)
            # The first is the one of a single canvas.
            keys = jnp.where(numbers == 0, jnp.repeat(keys, samples), others)
        blank = self.blank(rows, model.vocabulary, keys)
        canvas = Canvas.start(blank, rows.target_mask).replace(memory=self.start_memory(model, blank))
        carry = {
            "batch": batch,
            "rows": rows,
            "keys": keys,
            "inputs": CanvasInputs.of(self, model, batch, rows),
            "canvas": canvas,
            "steps": jnp.int32(0),
            "trace": start_trace(trace, blank, self.most_steps(blank.shape[1])),
        }
        return carry | {"finished": self._finished(canvas, model.vocabulary)}

    def advance(self, model: Transformer, carry: Carry) -> Carry:
        """Takes a step on each row's canvases."""

        def read(tokens, carry):
            return self.read(model, carry["inputs"], tokens, carry["rows"]), carry

        def show(carry, written):
            history = carry["trace"]
            history = history and history.record(
                carry["steps"], written.tokens, written.mask, written.log_probability, written.source
            )
            return carry | {"trace": history, "steps": carry["steps"] + 1}

        positions = jnp.asarray(carry["rows"].positions)
        canvas, carry = take_step(self, model, carry["canvas"], positions, carry["keys"], read, show, carry)
        return carry | {"canvas": canvas, "finished": self._finished(canvas, model.vocabulary)}

    def _finished(self, canvas: Canvas, vocabulary: TokenIds) -> BoolB:
        """Returns True for rows none of whose canvases takes another step."""
        may_write = jnp.any(eligible_now(self, canvas, vocabulary), axis=-1)
        return ~jnp.any(may_write.reshape(-1, self.num_samples), axis=-1)

    def finish(self, vocabulary: TokenIds, carry: Carry) -> Decoded:
        """The score is the sum of the steps' scores, averaged over the targets, of the best canvas."""
        samples, canvas, batch, history = self.num_samples, carry["canvas"], carry["batch"], carry["trace"]
        num_targets = jnp.sum(canvas.target_mask, axis=-1)
        scores = (canvas.score / jnp.maximum(num_targets, 1)).reshape(-1, samples)
        best = jnp.argmax(scores, axis=-1)

        def keep(x):  # [..., B * samples, L] -> [..., B, L]
            x = x.reshape(*x.shape[:-2], -1, samples, x.shape[-1])
            return x[..., jnp.arange(len(best)), best, :]

        decoded = Decoded.of(
            keep(canvas.tokens),
            batch,
            vocabulary,
            scores=jnp.max(scores, axis=-1),
            steps=carry["steps"],
            row_steps=jnp.max(canvas.row_steps.reshape(-1, samples), axis=-1),
            written_at=keep(canvas.written_at),
            trace=jax.tree.map(keep, history and history.end(carry["steps"])),
        )
        return decoded.replace(log_probability=keep(canvas.log_probability))


def eligible_now(rule: StepRule, canvas: Canvas, vocabulary: TokenIds) -> BoolBL:
    """Returns the targets that the next step may write."""
    return rule.eligible(canvas.tokens, canvas.target_mask, vocabulary, canvas.step) & ~canvas.finished[:, None]


def take_step(
    rule: StepRule,
    model: Transformer,
    canvas: Canvas,
    positions: IntBL,
    keys: KeyB,
    read: Callable[[IntBL, Any], tuple[FloatBLD, Any]],
    show: Callable[[Any, Written], Any],
    carry: Any,
) -> tuple[Canvas, Any]:
    """Takes one step; rows without a target that may be written stay as they are. Arguments as in `denoise`."""
    may_write = eligible_now(rule, canvas, model.vocabulary)
    hidden, carry = read(canvas.tokens, carry)
    step_keys = fold_in(stream(keys, "steps"), canvas.step[:, 0])
    written = rule.write(model, hidden, canvas, may_write, positions, step_keys)
    return canvas.after(written, jnp.any(may_write, axis=-1)), show(carry, written)


def denoise(
    rule: StepRule,
    model: Transformer,
    canvas: Canvas,
    positions: IntBL,
    keys: KeyB,
    read: Callable[[IntBL, Any], tuple[FloatBLD, Any]],
    show: Callable[[Any, Written], Any],
    carry: Any,
) -> tuple[Canvas, Any]:
    """Takes steps until no row has a target that may be written.

    Args:
      rule: what a step does.
      model: for the rule.
      canvas: before the first step.
      positions: of the slots in their segments.
      keys: a key for each row.
      read: maps tokens to the hidden states that predict them; takes and returns the carry (such as a cache).
      show: returns the carry after a step that wrote this.
      carry: any tree of arrays, the caller's own.
    """
    canvas = canvas.replace(memory=rule.start_memory(model, canvas.tokens))
    return jax.lax.while_loop(
        lambda state: jnp.any(eligible_now(rule, state[0], model.vocabulary)),
        lambda state: take_step(rule, model, state[0], positions, keys, read, show, state[1]),
        (canvas, carry),
    )


def check_guidance(rule: StepRule, model: Transformer) -> None:
    """Raises a UserError for a model whose capped logits are not linear in its hidden states."""
    if model.config.logits_softcap is not None:
        raise UserError(f"{type(rule).__name__}.guidance must be 0 for a model with ModelConfig.logits_softcap.")


class CanvasInputs(flax.struct.PyTreeNode):
    """The inputs that every step reads beside the canvases.

    Attributes:
      reading: how rows are read.
      encoded: an encoder's inputs.
      unguided: an encoder's inputs, all masked, for guidance.
    """

    reading: Reading
    encoded: Encoded | None
    unguided: Encoded | None = None

    @classmethod
    def of(cls, rule: StepRule, model: Transformer, batch: Batch, rows: Batch) -> Self:
        """Returns the inputs of a batch; `rows` are its rows, each repeated `num_samples` times."""

        def encode(batch):
            encoded = model.encode(batch)
            return encoded and encoded.repeat(rule.num_samples)

        inputs = cls(Reading.of(rows, model.vocabulary, model.config.shifted), encode(batch))
        if not rule.guidance:
            return inputs
        check_guidance(rule, model)
        if batch.encoder_tokens is not None:
            batch = batch.replace(encoder_tokens=jnp.full_like(batch.encoder_tokens, model.vocabulary.mask_id))
        return inputs.replace(unguided=encode(batch))

    def read(self, rule: StepRule, model: Transformer, tokens: IntBL, rows: Batch) -> FloatBLD:
        """Returns the hidden states that predict the tokens, with the rule's guidance."""
        seen = self.reading.output(model, tokens, BIDIRECTIONAL, self.encoded).hidden
        if not rule.guidance:
            return seen
        # Logits are linear in these hidden states, so theirs may be put together in place of the logits.
        masked = jnp.where(rows.input_mask, model.vocabulary.mask_id, tokens)
        unseen = self.reading.output(model, masked, BIDIRECTIONAL, self.unguided).hidden
        return unseen + (1 + rule.guidance) * (seen - unseen)
