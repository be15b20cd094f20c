"""Attention masks: which slots may attend to which."""

import dataclasses
from typing import ClassVar, Literal, Self

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.errors import UserError, check_choices
from diffusion_t5x.models.slots import take_slots
from diffusion_t5x.shapes import (
    AnyBoolBL,
    AnyIntBL,
    Array,
    BoolBL,
    BoolBQK,
    FloatScalar,
    IntB,
    IntBL,
    IntBQ,
    IntScalar,
    KeyScalar,
)

Reach = Literal["before", "all"]  # of its segment, a query sees the slots up to its own, or all
BlocksFrom = Literal["targets", "row"]


class Slots(flax.struct.PyTreeNode):
    """The properties of token slots that attention masks depend on.

    Attributes:
      segment_ids: 0 = empty. Slots of different segments never see each other.
      positions: restart with each segment.
      is_input: the slot holds a given token.
      is_noisy: the slot belongs to the second, noisy copy of the targets ("block_diffusion" only); otherwise None.
      seen: in a slot that holds a draft ("block_drafts" only) the number of clean slots that it sees, the first ones of
        its segment; -1 in clean slots. None: there are no drafts.
      index: a slot's index in its row if it differs from its place, as in a second copy; otherwise None. Slots of one
        segment are as far apart as their indices.
    """

    segment_ids: AnyIntBL
    positions: AnyIntBL
    is_input: AnyBoolBL
    is_noisy: BoolBL | None = None
    seen: IntBL | None = None
    index: Int[jax.Array, "1 length"] | None = None

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """Returns the slots of a batch whose tokens are in their own slots (no shift)."""
        return cls(segment_ids=batch.segment_ids, positions=batch.positions, is_input=batch.input_mask)

    def take(self, start: IntB, length: int) -> Self:
        """Returns per row b the `length` slots from `start[b]` on."""
        rows = jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, length))
        return jax.tree.map(lambda field: rows(field, start), self)

    def at(self, slots: IntBQ) -> Self:
        """Returns these slots of each row; those beyond the row's end are empty."""
        return jax.tree.map(lambda field: take_slots(field, slots), self)

    def within(self, keys: Self, window: int) -> BoolBQK:
        """Returns True if a key is less than `window` tokens away, before or after."""
        return jnp.abs(self.positions[:, :, None] - keys.positions[:, None, :]) < window


def same_segment(queries: Int[Array, "batch queries"], keys: Int[Array, "batch keys"]) -> BoolBQK:
    """Returns True for slots in the same segment, unless it is 0."""
    return (queries[:, :, None] == keys[:, None, :]) & (keys[:, None, :] > 0)


@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """An attention pattern between the tokens of a segment.

    Attributes:
      name: "causal": itself and what is before. "prefix": moreover, every input. "bidirectional": the whole segment.
        "block_causal": its own block and all that is before (BD3-LM, arXiv 2503.09573). "block_diffusion": clean slots
        as in "block_causal"; a noisy one sees the clean slots of earlier blocks and the noisy ones of its own, as it
        will when it is decoded behind a cache (the same paper, section 3.2). "block_drafts": clean slots as in
        "causal"; a draft sees its number of clean slots, and the drafts before it that see as many.
      block_size: tokens per block, for the last three; traced, where it grows in training.
      blocks_from: where blocks are counted from. "targets": the segment's first target, backwards too, so that the
        inputs' first block may be short. "row": the segment's first token, so that the last inputs may share a block
        with the first targets (SDAR, arXiv 2510.06303).
    """

    name: Literal["causal", "prefix", "bidirectional", "block_causal", "block_diffusion", "block_drafts"]
    block_size: int | IntScalar | None = None
    blocks_from: BlocksFrom = "targets"

    def __post_init__(self) -> None:
        check_choices(self)
        if self.name.startswith("block") != (self.block_size is not None):
            raise UserError(f"block_size is for block attention, and required there; got {self}.")
        if isinstance(self.block_size, int) and self.block_size < 1:
            raise UserError(f"block_size must be at least 1, not {self.block_size}.")

    def mask(self, queries: Slots, keys: Slots) -> BoolBQK:
        """Returns True if a query may see a key. Queries are slots of the same rows as the keys."""
        together = same_segment(queries.segment_ids, keys.segment_ids)
        query_position, key_position = queries.positions[:, :, None], keys.positions[:, None, :]
        if self.name == "bidirectional":
            return together
        if self.name == "causal":
            return together & (key_position <= query_position)
        if self.name == "prefix":
            return together & ((key_position <= query_position) | keys.is_input[:, None, :])
        if self.name == "block_drafts":
            assert queries.seen is not None and keys.seen is not None
            seen, key_seen = queries.seen[:, :, None], keys.seen[:, None, :]
            clean = (key_seen < 0) & (key_position < jnp.where(seen < 0, query_position + 1, seen))
            return together & (clean | ((seen >= 0) & (key_seen == seen) & (key_position <= query_position)))
        assert self.block_size is not None
        origin: jax.Array | int = 0
        if self.blocks_from == "targets":
            # Inputs come first in a segment, so their number is the position of its first target.
            origin = jnp.sum(together & keys.is_input[:, None, :], axis=-1, keepdims=True)
        query_block = (query_position - origin) // self.block_size
        key_block = (key_position - origin) // self.block_size
        if self.name == "block_causal":
            return together & (key_block <= query_block)
        assert queries.is_noisy is not None and keys.is_noisy is not None
        query_noisy, key_noisy = queries.is_noisy[:, :, None], keys.is_noisy[:, None, :]
        clean = ~key_noisy & (key_block <= query_block) & ~(query_noisy & (key_block == query_block))
        return together & (clean | (query_noisy & key_noisy & (key_block == query_block)))

    @property
    def order(self) -> Reach | None:
        """The order in which a segment's consecutive slots see each other; None if an order does not express it."""
        orders: dict[str, Reach] = {"causal": "before", "bidirectional": "all"}
        return orders.get(self.name)


CAUSAL = AttentionKind("causal")
PREFIX = AttentionKind("prefix")
BIDIRECTIONAL = AttentionKind("bidirectional")


@dataclasses.dataclass(frozen=True)
class Annealed:
    """An attention kind in transition from causal attention, for a pass over whole rows (DiffuLLaMA, arXiv 2410.17891).

    Attributes:
      kind: the attention kind at the end.
      share: the probability that a query sees a later key that `kind` allows.
      key: key of the draw, one for all rows.
    """

    kind: AttentionKind
    share: FloatScalar
    key: KeyScalar
    order: ClassVar[None] = None

    def mask(self, queries: Slots, keys: Slots) -> BoolBQK:
        """Returns True if a query may see a key."""
        shape = (1, queries.positions.shape[1], keys.positions.shape[1])
        is_open = jax.random.bernoulli(self.key, self.share, shape)
        return self.kind.mask(queries, keys) & (CAUSAL.mask(queries, keys) | is_open)


class Sight(flax.struct.PyTreeNode):
    """The keys that each query sees, in two forms: for kernels and as a mask.

    Attributes:
      mask: True if a query sees a key.
      sees: True if a query sees anything.
      query_segments, key_segments: segment ids; 0 = empty.
      order: expresses the mask together with the segments; None if they cannot.
      whole: the queries are whole rows, not the next slots over a cache.
    """

    mask: BoolBQK
    sees: Bool[jax.Array, "batch queries"]
    query_segments: Int[Array, "batch queries"]
    key_segments: Int[Array, "batch keys"]
    order: Reach | None = flax.struct.field(pytree_node=False, default=None)
    whole: bool = flax.struct.field(pytree_node=False, default=True)

    @classmethod
    def of(cls, kind: AttentionKind | Annealed, queries: Slots, keys: Slots, whole: bool) -> Self:
        """Returns the sight of slots in the same rows or, with `whole`, of the slots among themselves."""
        mask = kind.mask(queries, keys)
        order = kind.order if whole and keys.index is None else None
        return cls(mask, jnp.any(mask, axis=-1), queries.segment_ids, keys.segment_ids, order, whole)

    @classmethod
    def across(cls, queries: Int[Array, "batch queries"], keys: Int[Array, "batch keys"], whole: bool) -> Self:
        """Returns the sight of segments in the same segments of other rows."""
        mask = same_segment(queries, keys)
        return cls(mask, jnp.any(mask, axis=-1), queries, keys, "all", whole)
