"""Masked decoding of holes of unknown length: a mask may become two, or go away (DreamOn, arXiv 2602.01326)."""

import dataclasses
from typing import ClassVar

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.absorbing import AbsorbingRule
from diffusion_t5x.decoding.canvas import Canvas, CanvasInputs, Written
from diffusion_t5x.decoding.commit import choose, propose
from diffusion_t5x.decoding.decoder import Decoded, Watch
from diffusion_t5x.decoding.rows import Carry
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import BIDIRECTIONAL
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.reading import Reading
from diffusion_t5x.models.sampling import forbid
from diffusion_t5x.models.slots import take_slots
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import Array, BoolBL, FloatBLD, IntB, IntBL, KeyB, KeyScalar


class Resized(flax.struct.PyTreeNode):
    """State of rows with holes of unknown length, between two steps.

    Attributes:
      holes: see `Batch.holes`.
      expansions: masks that became two so far.
      decisions: tokens written, masks that became two and masks that went away so far.
    """

    holes: IntBL
    expansions: IntB
    decisions: IntB


@dataclasses.dataclass(frozen=True)
class ResizingDecoder(AbsorbingRule):
    """Fills holes of unknown length, with a model that was trained by `objectives.resizing`.

    A hole starts with some masks. Each step decides the most certain of them: it becomes a token, or at [expand] two
    masks, or at [delete] goes away. At temperature 0, these two are taken if they are more likely than not: the most
    likely token may be less likely than [delete] only because there are many tokens.

    A hole has at most the slots that `Batch.holes` gives it, and a row at most as many expansions as its holes have
    slots; [expand] is not proposed beyond that. The model reads the row without the slots that hold no token, so a row
    is what it would be if the hole had always had that length. Holes of known length and whole targets are written one
    token per step, as by `MaskedDecoder` with num_steps = None.

    The score is the log-probability of each decision when it was taken, averaged over decisions. Higher is better.

    Attributes:
      start_length: masks in a hole of unknown length before the first step, if it has room for them.
      threshold: a step also takes every decision whose probability exceeds it; None: one decision per step.
      temperature: of sampling; 0 takes the most likely decision.
      top_k, top_p: see `Sampling`.
    """

    keeps_written: ClassVar[bool] = False  # in its slot
    resizes_holes: ClassVar[bool] = True

    start_length: int = 4
    threshold: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_length < 1:
            raise UserError(f"ResizingDecoder.start_length must be at least 1; got {self.start_length}.")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UserError(f"ResizingDecoder.threshold must be a probability, or None; got {self.threshold}.")

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (Mode.of(BIDIRECTIONAL, "resize"),)

    def blank(self, batch: Batch, vocabulary: TokenIds, keys: KeyB) -> IntBL:
        """Returns the rows with MASK for targets; [delete] stands in slots of a hole that hold nothing."""
        tokens = super().blank(batch, vocabulary, keys)
        if batch.holes is None:
            return tokens
        holes, slots = jnp.asarray(batch.holes), jnp.arange(tokens.shape[1])
        first = holes != jnp.pad(holes[:, :-1], ((0, 0), (1, 0)))
        place = slots - jax.lax.cummax(jnp.where(first, slots, 0), axis=1)
        return jnp.where((holes > 0) & (place >= self.start_length), vocabulary.resizing()[1], tokens)

    def most_steps(self, num_targets: int) -> int:
        """A mask is there from the start or from an expansion, and goes once."""
        return 3 * num_targets

    def start(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar | KeyB,
        trace: bool | Watch = False,
        piece: int | None = None,
    ) -> Carry:
        carry = super().start(model, batch, key, trace, piece)
        if batch.holes is None:
            return carry
        nothing = jnp.zeros(len(batch.tokens), jnp.int32)
        memory = Resized(jnp.asarray(batch.holes), nothing, nothing)
        return carry | {"canvas": carry["canvas"].replace(memory=memory)}

    def read(self, model: Transformer, inputs: CanvasInputs, tokens: IntBL, rows: Batch) -> FloatBLD:
        if rows.holes is None:
            return super().read(model, inputs, tokens, rows)
        order, rows = without_gaps(rows, tokens, model.vocabulary)
        inputs = inputs.replace(reading=Reading.of(rows, model.vocabulary, model.config.shifted))
        hidden = inputs.read(self, model, take_slots(tokens, order), rows)
        return take_slots(hidden, jnp.argsort(order, axis=-1))

    def write(
        self,
        model: Transformer,
        hidden: FloatBLD,
        canvas: Canvas,
        eligible: BoolBL,
        positions: IntBL,
        keys: KeyB,
    ) -> Written:
        """Takes one step: decides the most certain masks."""
        if canvas.memory is None:

            def read_out(logits, positions):
                return propose(logits, keys, positions, model.vocabulary, self.sampling, "confidence")

            tokens, log_probability, certainty = model.map_logits(read_out, hidden, positions)
            chosen = choose(certainty, eligible, jnp.ones(len(eligible)), self.threshold)
            return self.written(canvas, chosen, tokens, log_probability)
        return self._resize(model, hidden, canvas, eligible, positions, keys)

    def _resize(
        self,
        model: Transformer,
        hidden: FloatBLD,
        canvas: Canvas,
        eligible: BoolBL,
        positions: IntBL,
        keys: KeyB,
    ) -> Written:
        memory: Resized = canvas.memory
        expand, delete = model.vocabulary.resizing()
        vocabulary = model.vocabulary.with_resizing()
        resizable = memory.holes > 0
        free = in_hole(resizable & (canvas.tokens == delete), memory.holes)
        budget = jnp.sum(resizable, axis=-1) - memory.expansions
        may_expand = (free > 0) & (budget > 0)[:, None]

        def read_out(logits, positions, may_expand, may_delete):
            ids = jnp.arange(logits.shape[-1])
            barred = ((ids == expand) & ~may_expand[..., None]) | ((ids == delete) & ~may_delete[..., None])
            allowed = forbid(jnp.where(barred, -jnp.inf, logits), vocabulary)
            if not self.temperature:  # tokens share their probability: against a state, they count together
                states = jax.nn.softmax(allowed)[..., jnp.array([expand, delete])]
                unlikely = jnp.where(states > 0.5, 0, states)
                barred = ((ids == expand) & (unlikely[..., :1] > 0)) | ((ids == delete) & (unlikely[..., 1:] > 0))
                allowed = jnp.where(barred, -jnp.inf, allowed)
                left = 1 - jnp.sum(unlikely, axis=-1)
            else:
                left = jnp.ones(positions.shape)
            tokens, log_probability, certainty = propose(
                allowed, keys, positions, vocabulary, self.sampling, "confidence"
            )
            return tokens, log_probability + jnp.log(left), certainty * left

        proposed, log_probability, certainty = model.map_logits(read_out, hidden, positions, may_expand, resizable)
        chosen = choose(certainty, eligible, jnp.ones(len(eligible)), self.threshold)
        # Expansions of one step share the free slots of their hole and the budget of the row.
        expands = chosen & (proposed == expand)
        fits = (in_hole(expands, memory.holes, before=True) < free) & (jnp.cumsum(expands, axis=-1) <= budget[:, None])
        expands &= fits
        chosen &= expands | (proposed != expand)
        tokens = jnp.where(chosen, jnp.where(expands, model.vocabulary.mask_id, proposed), canvas.tokens)
        source = _rearranged(tokens, expands, memory.holes, delete)
        written = chosen & (proposed != expand) & (proposed != delete)
        return Written(
            tokens=jnp.where(source < tokens.shape[1], take_slots(tokens, source), delete),
            mask=take_slots(written, source),
            log_probability=take_slots(log_probability, source),
            score=jnp.sum(jnp.where(chosen, log_probability, 0), axis=-1),
            source=source,
            memory=memory.replace(
                expansions=memory.expansions + jnp.sum(expands, axis=-1, dtype=jnp.int32),
                decisions=memory.decisions + jnp.sum(chosen, axis=-1, dtype=jnp.int32),
            ),
        )

    def finish(self, vocabulary: TokenIds, carry: Carry) -> Decoded:
        """Returns rows without the slots that holes did not need; padding fills them up."""
        canvas, batch, history = carry["canvas"], carry["batch"], carry["trace"]
        if canvas.memory is None:
            return super().finish(vocabulary, carry)

        def close(tokens, values):
            order, rows = without_gaps(batch, tokens, vocabulary)
            there = rows.segment_ids > 0
            tokens = jnp.where(there, take_slots(tokens, order), jnp.asarray(batch.tokens)[:, -1:])
            return tokens, jnp.where(there, take_slots(values, order), 0), rows

        tokens, number, rows = close(canvas.tokens, canvas.written_at + 1)
        history = history and history.end(carry["steps"])
        if history is not None:
            shown = jax.lax.map(lambda frame: close(*frame)[:2], (history.tokens, history.confidence))
            history = history.replace(tokens=shown[0], confidence=shown[1])
        decoded = Decoded.of(
            tokens,
            batch.replace(target_mask=rows.target_mask),
            vocabulary,
            scores=canvas.score / jnp.maximum(canvas.memory.decisions, 1),
            steps=carry["steps"],
            row_steps=canvas.row_steps,
            written_at=number - 1,
            trace=history,
        )
        return decoded.replace(target_mask=rows.target_mask)


def in_hole(mask: BoolBL, holes: IntBL, before: bool = False) -> IntBL:
    """Returns for every slot the number of slots of its own hole, or `before` it, where the mask is True."""
    same = holes[:, :, None] == holes[:, None, :]
    if before:
        slots = jnp.arange(holes.shape[1])
        same &= slots[None, None, :] < slots[None, :, None]
    return jnp.sum(same & mask[:, None, :], axis=-1, dtype=jnp.int32)


def _rearranged(tokens: IntBL, expands: BoolBL, holes: IntBL, delete: int) -> IntBL:
    """Returns the slot that each slot's content comes from: one that expands twice, and L, for nothing, last."""
    length = tokens.shape[1]
    resizable = holes > 0
    width = jnp.where(resizable & (tokens == delete), 0, 1 + expands)
    unused = in_hole(resizable, holes) - in_hole(resizable & (width > 0), holes) - in_hole(expands, holes)
    is_last = resizable & (holes != jnp.pad(holes[:, 1:], ((0, 0), (0, 1))))
    ends = jnp.cumsum(width + jnp.where(is_last, unused, 0), axis=-1)
    slots = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    source = jax.vmap(lambda row, slot: jnp.searchsorted(row, slot, side="right"))(ends, slots).astype(jnp.int32)
    full = take_slots(ends - jnp.where(is_last, unused, 0), source)
    return jnp.where(slots < full, source, length)


def without_gaps(rows: Batch, tokens: IntBL, vocabulary: TokenIds) -> tuple[IntBL, Batch]:
    """Returns the order of slots that puts those that hold nothing last, and the rows in that order."""
    holes = jnp.asarray(rows.holes)
    empty = (holes > 0) & (tokens == vocabulary.resizing()[1])
    spare = holes < 0
    padding = spare & (jnp.cumsum(spare, axis=-1) <= jnp.sum(empty, axis=-1, keepdims=True))
    there = (jnp.asarray(rows.segment_ids) > 0) & ~empty | padding
    order = jnp.argsort(~there, axis=-1, stable=True).astype(jnp.int32)
    slots = jnp.arange(holes.shape[1])
    exists = slots < jnp.sum(there, axis=-1, keepdims=True)

    def moved(x: Array) -> jax.Array:
        return take_slots(x, order)

    return order, rows.replace(
        tokens=moved(rows.tokens),
        target_mask=exists & moved(rows.target_mask),
        segment_ids=exists.astype(jnp.int32),
        positions=jnp.where(exists, slots, 0).astype(jnp.int32),
    )
