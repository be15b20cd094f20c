"""Masked diffusion that also learns to resize holes: [expand] and [delete] (DreamOn, arXiv 2602.01326)."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import text_of
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.sampling import uniform
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.shapes import BoolB1, BoolBL, FloatBL, IntBL, KeyB, KeyScalar


@dataclasses.dataclass(frozen=True)
class Resizing(Masked):
    """Masked diffusion; in some examples only a hole is noisy, and its number of masks may be wrong.

    Each run of masks in a hole, between two tokens that are seen, stands for n >= 0 tokens with k masks. If k = n, the
    masks' targets are these tokens. If k > n, the last k - n targets are [delete]. If k < n, the last target is
    [expand], which stands for all tokens that have no mask of their own. So a run whose mask becomes two, or goes away,
    is again one of these: `decoding.resizing` walks through such runs.

    DreamOn merges masks and adds some at random places. Here n and k determine every target.

    Packed rows have no holes. Targets should fill a canvas: surplus masks take the place of its padding, and more
    padding makes up for missing ones.

    Attributes:
      hole_share: share of examples with a hole, whose ends are drawn uniformly; the others are those of `Masked`.
      most_masks: k is drawn from 1 to this, its logarithm uniformly, whatever n is: so k says nothing about n, as in a
        hole of unknown length. Between two seen tokens of a hole (n = 0) it is drawn as often as a token is masked, and
        0 otherwise.
    """

    hole_share: float = 0.5
    most_masks: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.hole_share <= 1:
            raise UserError(f"Resizing.hole_share must lie in [0, 1]; got {self.hole_share}.")
        if self.most_masks < 1:
            raise UserError(f"Resizing.most_masks must be at least 1; got {self.most_masks}.")

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (Mode.of(self.attention, "resize"), *super().modes)

    def _corrupt(self, vocabulary: TokenIds, batch: Batch, key: KeyScalar) -> tuple[Batch, IntBL, FloatBL]:
        keys = row_keys(stream(key, "holes"), batch.example_ids)
        hole, borders, has_hole = self._holes(vocabulary, batch, keys)
        noisy = batch.replace(target_mask=jnp.where(has_hole, hole, batch.target_mask))
        _, tokens, weights = super()._corrupt(vocabulary, noisy, key)
        masked = jnp.asarray(noisy.target_mask) & (tokens == vocabulary.mask_id)
        sizes = self._sizes(masked, borders, has_hole & ~jnp.any(hole, axis=-1, keepdims=True), keys)
        batch, masked, source = resize(batch, masked, sizes, vocabulary)
        weights = jnp.take_along_axis(weights, source, axis=-1)
        return batch, jnp.where(masked, vocabulary.mask_id, batch.tokens), weights

    def _holes(self, vocabulary: TokenIds, batch: Batch, keys: KeyB) -> tuple[BoolBL, BoolBL, BoolB1]:
        """Returns each row's hole, the slots that a run of its masks may end before, and `[B, 1]` if it has one."""
        follows = jnp.pad(batch.segment_ids[:, 1:] > 0, ((0, 0), (0, 1)))
        text = jnp.asarray(text_of(batch, vocabulary)) & ~vocabulary.is_end(batch.tokens) & follows
        size = jnp.sum(text, axis=-1, keepdims=True)
        draws = jax.vmap(lambda key: jax.random.uniform(key, (3,), jnp.float32))(stream(keys, "span"))
        ends = jnp.sort(jnp.minimum((draws[:, 1:] * (size + 1)).astype(jnp.int32), size), axis=-1)
        place = jnp.arange(text.shape[1]) - jnp.argmax(text, axis=-1, keepdims=True)
        after_start, before_end = place >= ends[:, :1], place < ends[:, 1:]
        single = jnp.max(batch.segment_ids, axis=-1, keepdims=True) == 1
        has_hole = (draws[:, :1] < self.hole_share) & (size > 0) & single
        return text & after_start & before_end, has_hole & after_start & (place <= ends[:, 1:]), has_hole

    def _sizes(self, masked: BoolBL, borders: BoolBL, is_empty: BoolB1, keys: KeyB) -> IntBL:
        """Returns the number of masks that each slot is to have before it; see `resize`."""
        n = run_lengths(masked)
        slots = jnp.broadcast_to(jnp.arange(masked.shape[1]), masked.shape)
        which, size = (uniform(stream(keys, name), slots) for name in ("which", "size"))
        num_masks = jnp.sum(masked, axis=-1, keepdims=True)
        share = num_masks / jnp.maximum(num_masks + jnp.sum(borders, axis=-1, keepdims=True) - 1, 1)
        drawn = jnp.exp(size * math.log(self.most_masks + 1)).astype(jnp.int32)
        return jnp.where(borders & ((n > 0) | is_empty | (which < share)), jnp.minimum(drawn, self.most_masks), n)


def run_lengths(masked: BoolBL) -> IntBL:
    """Returns the number of masked slots directly before each slot."""
    slots = jnp.arange(masked.shape[1])
    last_seen = jax.lax.cummax(jnp.where(masked, -1, slots), axis=1)
    return slots - 1 - jnp.pad(last_seen[:, :-1], ((0, 0), (1, 0)), constant_values=-1)


def resize(batch: Batch, masked: BoolBL, sizes: IntBL, vocabulary: TokenIds) -> tuple[Batch, BoolBL, IntBL]:
    """Gives runs of masks another number of masks; what follows moves.

    Args:
      batch: clean tokens, in rows of which those with a changed run hold one example.
      masked: the masked slots. A run at the row's end stays as it is.
      sizes: for each slot that is not masked, the number of masks before it. Masks are added as far as padding or empty
        slots at the row's end make room.
      vocabulary: defines [expand], [delete] and padding.

    Returns:
      The batch with the targets of the new rows, their masked slots, and the old slot that each new one was.
    """
    expand, delete = vocabulary.resizing()
    length = masked.shape[1]
    slots = jnp.broadcast_to(jnp.arange(length), masked.shape)
    exists = batch.segment_ids > 0
    n = run_lengths(masked)
    border = jax.lax.cummin(jnp.where(masked, length, slots), axis=1, reverse=True)
    k, whole = (jnp.take_along_axis(x, jnp.minimum(border, length - 1), axis=1) for x in (sizes, n))
    kept = ~masked | (n < k) | (border == length)
    expands = masked & (n == k - 1) & (k < whole) & (border < length)

    text_end = jnp.max(jnp.where(exists & text_of(batch, vocabulary), slots + 1, 0), axis=-1, keepdims=True)
    old_end = jnp.sum(exists, axis=-1, keepdims=True)
    added = jnp.minimum(jnp.cumsum(jnp.where(masked, 0, jnp.maximum(sizes - n, 0)), axis=-1), length - text_end)
    ends = jnp.cumsum(kept, axis=-1) + added
    source = jax.vmap(lambda row, slot: jnp.searchsorted(row, slot, side="right"))(ends, slots)
    source = jnp.minimum(source, length - 1).astype(jnp.int32)

    def moved(x):
        return jnp.take_along_axis(jnp.asarray(x), source, axis=1)

    deleted = slots < moved(ends) - 1
    growth = jnp.sum(jnp.where(exists, jnp.diff(ends, prepend=0), 0), axis=-1, keepdims=True) - old_end
    padding = old_end - text_end
    end = old_end + jnp.where(padding > 0, jnp.maximum(growth - padding, 0), growth)
    is_old = (slots < ends[:, -1:]) & moved(exists)
    tokens = jnp.where(deleted, delete, jnp.where(moved(expands), expand, moved(batch.tokens)))
    single = jnp.max(batch.segment_ids, axis=-1, keepdims=True) == 1
    there = slots < end
    batch = batch.replace(
        tokens=jnp.where(is_old & there, tokens, vocabulary.pad_id),
        target_mask=there & (deleted | ~is_old | moved(batch.target_mask)),
        segment_ids=jnp.where(there, jnp.maximum(moved(batch.segment_ids), 1), 0),
        positions=jnp.where(there, jnp.where(single, slots, moved(batch.positions)), 0),
        written_at=None,  # they would have the places of the batch
        written_log_probability=None,
    )
    return batch, there & is_old & (deleted | moved(masked)), source
