"""The protocol of decoders."""

from collections.abc import Callable
from typing import ClassVar, Protocol, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import after_end
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import AttentionKind
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.slots import take_slots
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import AnyBoolBL, AnyIntBL, BoolBL, FloatB, FloatBL, IntB, IntBL, IntScalar, KeyScalar

Watch = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
"""Is called while a decoder is at work: with a step's number, counted from 1 (0: before the first), and what a `Trace`
has of it, tokens and confidence `[B, L]`. Calls may overtake one another; an exception ends the decoding."""


class Trace(flax.struct.PyTreeNode):
    """The rows before the first step and after each one; steps after a decoder's last one repeat the end.

    Attributes:
      tokens: the rows.
      confidence: the probability that the model gave to a token in the step that (last) wrote it, at temperature 1 over
        all ids that may be written; 0 if unwritten, and at positions that are not targets.
    """

    tokens: Int[jax.Array, "states batch length"]
    confidence: Float[jax.Array, "states batch length"]

    @classmethod
    def start(cls, tokens: IntBL, most_steps: int) -> Self:
        """Returns an empty trace of rows before the first step, with room for `most_steps` steps."""
        tokens = jnp.broadcast_to(tokens, (most_steps + 1, *tokens.shape))
        return cls(tokens=tokens, confidence=jnp.zeros(tokens.shape, jnp.float32))

    def record(
        self,
        step: IntScalar,
        tokens: IntBL,
        mask: AnyBoolBL,
        log_probability: Float[jax.Array, " batch #length"],
        source: IntBL | None = None,
    ) -> Self:
        """Returns the trace with one more step, counted from 0; arguments as in `canvas.Written`."""
        before = self.confidence[step]
        before = before if source is None else take_slots(before, source)
        confidence = jnp.where(mask, jnp.exp(log_probability), before)
        return self.replace(
            tokens=self.tokens.at[step + 1].set(tokens), confidence=self.confidence.at[step + 1].set(confidence)
        )

    def end(self, steps: IntScalar) -> Self:
        """Fills the steps after the last one taken with the final state."""
        shown = jnp.minimum(jnp.arange(len(self.tokens)), steps)
        return jax.tree.map(lambda x: x[shown], self)


class Watched(flax.struct.PyTreeNode):
    """Replaces a `Trace`: shows each step to a `Watch` when it is taken, and keeps none.

    Attributes:
      confidence: after the last step; see `Trace`.
      watch: called with each step.
      first, length: the part of the decoder's rows that is the batch's.
    """

    confidence: FloatBL
    watch: Watch = flax.struct.field(pytree_node=False)
    first: int = flax.struct.field(pytree_node=False)
    length: int = flax.struct.field(pytree_node=False)

    def record(
        self,
        step: IntScalar,
        tokens: IntBL,
        mask: AnyBoolBL,
        log_probability: Float[jax.Array, " batch #length"],
        source: IntBL | None = None,
    ) -> Self:
        before = self.confidence if source is None else take_slots(self.confidence, source)
        after = self.replace(confidence=jnp.where(mask, jnp.exp(log_probability), before))
        after.show(step + 1, tokens)
        return after

    def show(self, number: IntScalar | int, tokens: IntBL) -> None:
        shown = (x[:, self.first : self.first + self.length] for x in (tokens, self.confidence))
        jax.debug.callback(self.watch, number, *shown)

    def end(self, steps: IntScalar) -> None:
        """Returns None: nothing is kept."""


def start_trace(
    trace: bool | Watch, tokens: IntBL, most_steps: int, first: int = 0, length: int | None = None
) -> Trace | Watched | None:
    """Starts recording a decoder's steps; returns None if they are neither kept nor shown.

    Args:
      trace: keep them, show them, or neither.
      tokens: rows before the first step.
      most_steps: maximum number of steps.
      first, length: the part of these rows that is the batch's; by default, all.
    """
    if not callable(trace):
        return Trace.start(tokens, most_steps) if trace else None
    watched = Watched(jnp.zeros(tokens.shape, jnp.float32), trace, first, tokens.shape[1] if length is None else length)
    watched.show(0, tokens)
    return watched


class Decoded(flax.struct.PyTreeNode):
    """The output of a decoder.

    Attributes:
      tokens: the batch's rows with the written tokens at the target positions; targets after the end of a text are
        padding.
      scores: the decoder's own measure of its output; its docstring defines it and says if higher or lower is better.
      steps: number of model steps taken (not counting the prompt's).
      row_steps: number of steps that a row took part in: as many as it would take alone.
      num_tokens: number of tokens in the output, including the one that ends it.
      canvas: the tokens including everything written after an end.
      written_at: the step in which a target got its final token, counted from 0, in a block decoder from 0 in each
        block; -1 if nothing was written.
      trace: the rows before the first step and after each one; None unless asked for.
      num_drafted, num_accepted: numbers of tokens that a speculating decoder drafted and accepted; otherwise None.
      log_probability: of each written token in the step that wrote it, at temperature 1 over all ids that may be
        written; 0 where none was. From `BlockDecoder`, `AutoregressiveDecoder` and a `StepRule` that resizes no holes;
        otherwise None.
      target_mask: where the written targets are in `tokens`, if holes have found their length (see `Batch.holes`): the
        slots that they did not need are gone, with padding at the end. None: where the batch has its targets.
    """

    tokens: IntBL
    scores: FloatB
    steps: IntScalar
    row_steps: IntB
    num_tokens: IntB
    canvas: IntBL
    written_at: IntBL
    trace: Trace | None = None
    num_drafted: IntB | None = None
    num_accepted: IntB | None = None
    log_probability: FloatBL | None = None
    target_mask: BoolBL | None = None

    @classmethod
    def of(
        cls,
        canvas: IntBL,
        batch: Batch,
        vocabulary: TokenIds,
        *,
        scores: FloatB,
        steps: IntScalar,
        row_steps: IntB,
        written_at: IntBL,
        trace: Trace | None = None,
        num_drafted: IntB | None = None,
        num_accepted: IntB | None = None,
    ) -> Self:
        """Returns the text written into a batch's targets, up to its end."""
        text = batch.target_mask & ~after_end(canvas, batch, vocabulary)
        return cls(
            tokens=end_at_eos(canvas, batch, vocabulary),
            num_tokens=jnp.sum(text, axis=-1, dtype=jnp.int32),
            canvas=canvas,
            scores=scores,
            steps=steps,
            row_steps=row_steps,
            written_at=written_at,
            trace=trace,
            num_drafted=num_drafted,
            num_accepted=num_accepted,
        )


class Decoder(Protocol):
    """A frozen dataclass that writes the targets of a batch. It never reads the tokens at target positions.

    Decoders derive from this class and declare what differs from its defaults.

    Attributes:
      autoregressive: uses the model as an autoregressive one, whatever `ModelConfig.shifted` says.
      left_to_right: writes the targets in order; unwritten targets are pad.
      fills_holes: targets may be followed by inputs, and need not be contiguous.
      resizes_holes: also fills holes of unknown length, see `Batch.holes`.
    """

    autoregressive: ClassVar[bool] = False
    left_to_right: ClassVar[bool] = False
    fills_holes: ClassVar[bool] = False
    resizes_holes: ClassVar[bool] = False

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes in which it uses a model; the model must have learned all of them. () if not declared."""
        return ()

    def within(self, language: Language) -> Self:
        """Returns this decoder, writing only texts of a language.

        Raises:
          UserError: it cannot, by its kind or its settings.
        """
        raise UserError(
            f"{type(self).__name__} takes neither --regex nor --json_schema. These take them: MaskedDecoder, "
            "SundaeDecoder, BlockDecoder of one of the two, and AutoregressiveDecoder."
        )

    def decode(self, model: Transformer, batch: Batch, key: KeyScalar, trace: bool | Watch = False) -> Decoded:
        """Writes the batch's targets. Rows draw from the key by `example_ids`, so neighbours have no effect.

        Args:
          model: reads and predicts.
          batch: its targets are written.
          key: random key for all draws.
          trace: keep every step, or show it to a `Watch` during decoding.
        """


def check_fills(decoder: Decoder, unknown_lengths: bool) -> None:
    """Raises a UserError if a decoder cannot fill the holes of a text.

    Args:
      decoder: is to fill them.
      unknown_lengths: the length of some is not known.
    """
    if not decoder.fills_holes:
        raise UserError(
            f"{type(decoder).__name__} writes from left to right and cannot fill holes, whose ends are given: take a "
            "model of masked or SUNDAE diffusion with MaskedDecoder or SundaeDecoder (decoding/masked.gin, "
            "decoding/sundae.gin)."
        )
    if unknown_lengths and not decoder.resizes_holes:
        raise UserError(
            f"{type(decoder).__name__} cannot fill <hole:?>, whose length is not known: take ResizingDecoder "
            "(decoding/resizing.gin) with a model that was trained by objectives/resizing.gin, or give its length, "
            "<hole:N>."
        )


def check_free(decoder: Decoder, language: Language | None) -> None:
    """Raises a UserError if the inner decoder of one that keeps to no language has one."""
    if language is not None:
        raise UserError(
            f"{type(decoder).__name__} takes an inner decoder that may write any text, not one within {language}."
        )


def target_range(target_mask: AnyBoolBL) -> tuple[IntB, IntB]:
    """Returns the index of each row's first target and its number of targets."""
    return jnp.argmax(target_mask, axis=-1).astype(jnp.int32), jnp.sum(target_mask, axis=-1, dtype=jnp.int32)


def into_block(kind: AttentionKind, positions: AnyIntBL, first_target: IntB) -> IntB | int:
    """Returns the number of inputs in the block of the first target.

    Args:
      kind: attention in blocks.
      positions: of the slots in their segments.
      first_target: its index in the row.
    """
    if kind.blocks_from == "targets":
        return 0
    assert kind.block_size is not None
    return jnp.take_along_axis(jnp.asarray(positions), first_target[:, None], axis=-1)[:, 0] % kind.block_size


def end_at_eos(tokens: IntBL, batch: Batch, vocabulary: TokenIds) -> IntBL:
    """Returns rows whose targets end at the first EOS or pad: EOS stays, and all targets after it are padding.

    Without EOS and pad, the whole canvas is the output; if EOS or pad comes first, the output is empty.
    """
    return jnp.where(batch.target_mask & after_end(tokens, batch, vocabulary), vocabulary.pad_id, tokens)
