"""The model's reading of noisy tokens: its input, and which hidden state predicts which token.

A model that was pretrained autoregressively predicts a token in the slot of the previous one. Diffusion either relearns
that ("same-position": a token is predicted in its own slot) or keeps it ("shifted", see `ModelConfig.shifted`); its
attention may become bidirectional at once or gradually.
"""

from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import Annealed, AttentionKind, Slots
from diffusion_t5x.models.output import Output
from diffusion_t5x.models.slots import put_slots
from diffusion_t5x.models.stack import Encoded
from diffusion_t5x.models.transformer import ModelDefinition, Transformer
from diffusion_t5x.shapes import AnyIntBL, FloatBLD, IntBL, KeyB

# A packed row has room for one more segment per this many tokens of its length.
TOKENS_PER_SEGMENT = 16


def start_first(tokens: AnyIntBL, positions: AnyIntBL, vocabulary: TokenIds) -> IntBL:
    """Returns the model's input for masked tokens: the start token if a segment's first token is masked.

    A model that reads no start token (`ModelConfig.reads_start`) gets the tokens as they are.

    That happens where no input comes before: in an encoder-decoder's decoder above all. Relative and rotary positions
    are differences between tokens that differ: over nothing but MASK, every position would have the same logits. The
    start token says where the row begins, and an autoregressive model's first slot reads it too.
    """
    if not vocabulary.reads_start:
        return jnp.asarray(tokens)
    return jnp.where((tokens == vocabulary.mask_id) & (positions == 0), vocabulary.start_id, tokens)


def shift_right(tokens: AnyIntBL, positions: AnyIntBL, start_id: int) -> IntBL:
    """Returns an autoregressive model's input: the previous token, or the start token first in a segment."""
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(positions == 0, start_id, before)


def shifted_slots(batch: Batch, vocabulary: TokenIds) -> Slots:
    """The slots of tokens that `shift_right` moved: a slot is an input where the token it *holds* is one.

    The start token is an input. A model that reads none (`ModelConfig.reads_start`) does not see it behind a segment's
    first slot, which is a segment by itself, and positions count from the first token; nor is it seen where the first
    input is the start token itself, as chat templates write it.
    """
    first = (batch.positions == 0) & (batch.segment_ids > 0)
    holds_input = jnp.pad(batch.input_mask[:, :-1], ((0, 0), (1, 0))) | first
    slots = Slots(
        segment_ids=batch.segment_ids, positions=batch.positions, is_input=holds_input & (batch.segment_ids > 0)
    )
    if batch.encoder_tokens is not None:
        return slots
    hidden = first & batch.input_mask & (batch.tokens == vocabulary.start_id) if vocabulary.reads_start else first
    # The segments whose start token is hidden: positions restart at each segment's first slot.
    since = jnp.maximum(jnp.arange(batch.tokens.shape[1]) - batch.positions, 0)
    is_hidden = jnp.take_along_axis(hidden, since, axis=1)
    return slots.replace(
        segment_ids=2 * batch.segment_ids - hidden,
        positions=jnp.where(is_hidden & ~first, batch.positions - 1, batch.positions),
    )


def check_blocks(kind: AttentionKind | Annealed, shifted: bool) -> None:
    """Raises a UserError for a shifted model with blocks from the row's beginning: they have no meaning there."""
    blocks_from = kind.kind.blocks_from if isinstance(kind, Annealed) else kind.blocks_from
    if shifted and blocks_from == "row":
        raise UserError(
            'blocks_from = "row" is for models that predict a token in its own slot: set ModelConfig.shifted = False, '
            'or blocks_from = "targets" (--gin.BLOCKS_FROM).'
        )


class Reading(flax.struct.PyTreeNode):
    """Rows as the model reads them.

    Same-position: slot i holds token i, and its hidden state predicts it. Shifted: in each segment the start token
    comes first, as one more input, and all tokens after it, so that the slot before a token's own predicts it. A
    segment has a slot more than it has tokens; the last slot predicts nothing, but what it holds is seen. Shifted
    without a start token, tokens stay in their places, and a segment's first one is predicted in its own slot (Dream).

    Attributes:
      batch: the clean tokens so laid out, rows of some length L'.
      slot: where each token stands in it; L' for what has no place. None: in its own place.
      shifted: hidden states predict the next slot's token.
    """

    batch: Batch
    slot: IntBL | None
    shifted: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def of(cls, batch: Batch, vocabulary: TokenIds, shifted: bool, packed: bool = False) -> Self:
        """Returns the reading of rows of length L.

        Args:
          batch: clean tokens.
          vocabulary: defines the start token.
          shifted: see `ModelConfig`.
          packed: rows may hold several segments. If shifted, there is room for `1 + L / 16` of them, and for one more
            per padding position; the last tokens of a row with more are dropped, see `fits`.
        """
        if not (shifted and vocabulary.reads_start):
            return cls(batch, None, shifted)
        length = batch.tokens.shape[1]
        width = length + 1 + (length // TOKENS_PER_SEGMENT if packed else 0)
        there = batch.segment_ids > 0
        first = there & (batch.positions == 0)
        slot = jnp.where(there, jnp.arange(length) + jnp.cumsum(first, axis=-1), width)
        before_first = jnp.where(first, slot - 1, width)

        def place(values, of_start):
            starts = jnp.broadcast_to(of_start, slot.shape).astype(values.dtype)
            return put_slots(put_slots(jnp.zeros((len(slot), width), values.dtype), slot, values), before_first, starts)

        read = batch.replace(
            tokens=place(batch.tokens, vocabulary.start_id),
            target_mask=place(batch.target_mask, False),
            segment_ids=place(batch.segment_ids, batch.segment_ids),
            positions=place(batch.positions + 1, 0),
            written_at=None,  # they would have the places of the batch
            written_log_probability=None,
            canvases=None,
            canvas_log_probability=None,
        )
        return cls(read, slot, shifted)

    def fits(self, batch: Batch) -> Batch:
        """Returns the batch without the tokens that were dropped."""
        if self.slot is None:
            return batch
        has_place = self.slot < self.batch.tokens.shape[1]
        return batch.replace(
            target_mask=batch.target_mask & has_place, segment_ids=jnp.where(has_place, batch.segment_ids, 0)
        )

    def tokens(self, noisy: IntBL, vocabulary: TokenIds) -> Int[jax.Array, "batch read"]:
        """Returns the model's input for noisy tokens."""
        if self.slot is None:
            return start_first(noisy, self.batch.positions, vocabulary)
        return put_slots(self.batch.tokens, self.slot, noisy)

    def states(self, hidden: Float[jax.Array, "batch read embed"], offset: IntBL | int = 0) -> FloatBLD:
        """Selects from hidden states of at least L' slots those that predict the tokens.

        Shifted, `offset` is added to their slots.
        """
        if not self.shifted:
            return hidden
        if self.slot is None:
            before = jnp.arange(self.batch.tokens.shape[1]) - (self.batch.positions > 0)
        else:
            before = self.slot - 1
        slot = jnp.minimum(before + offset, hidden.shape[1] - 1)
        return jnp.take_along_axis(hidden, slot[..., None], axis=1)

    def output(
        self,
        model: Transformer,
        noisy: IntBL,
        kind: AttentionKind | Annealed,
        encoded: Encoded | None = None,
        dropout_keys: KeyB | None = None,
    ) -> Output:
        """Runs a pass over noisy tokens; its hidden states predict the tokens."""
        tokens = self.tokens(noisy, model.vocabulary)
        output = model(tokens, Slots.of(self.batch), kind, encoded, dropout_keys)
        return output.replace(hidden=self.states(output.hidden))


def model_reads(noisy: IntBL, batch: Batch, model: ModelDefinition) -> IntBL:
    """Returns the tokens in the predicting slots: the noisy ones or, if shifted, the previous ones."""
    if model.config.shifted:
        before = shift_right(noisy, batch.positions, model.vocabulary.start_id)
        return before if model.vocabulary.reads_start else jnp.where(batch.positions == 0, noisy, before)
    return start_first(noisy, batch.positions, model.vocabulary)
