"""Blocks of targets: where they start, and the pass that reads the clean tokens and the noisy targets of all blocks."""

import jax
import jax.numpy as jnp
from jaxtyping import Int

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.models.masks import Annealed, AttentionKind, BlocksFrom, Slots
from diffusion_t5x.models.output import Output
from diffusion_t5x.models.reading import Reading, check_blocks
from diffusion_t5x.models.stack import Encoded
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import FloatBLD, IntB, IntBL, IntScalar, KeyB


def first_targets(batch: Batch) -> IntBL:
    """The position of the first target of the segment that a slot is in."""

    def count_inputs(segment_ids, input_mask):
        return jax.ops.segment_sum(input_mask.astype(jnp.int32), segment_ids, segment_ids.size + 1)[segment_ids]

    return jax.vmap(count_inputs)(batch.segment_ids, batch.input_mask)


def block_starts(
    batch: Batch, block_size: int | IntScalar, blocks_from: BlocksFrom = "targets", ahead: IntB | int = 0
) -> IntBL:
    """The row index of the first target of the block that a target is in.

    Undefined for inputs and padding.

    Args:
      batch: its targets are divided into blocks.
      block_size, blocks_from: as in `AttentionKind`.
      ahead: number of tokens, of each row or of all, by which blocks begin before the place they are counted from.
    """
    after_first = batch.positions - first_targets(batch)
    place = after_first if blocks_from == "targets" else batch.positions
    in_block = (place + jnp.asarray(ahead)[..., None]) % block_size
    return jnp.arange(batch.tokens.shape[1]) - jnp.minimum(in_block, jnp.maximum(after_first, 0))


def clean_and_noisy(
    batch: Batch, noisy: IntBL, kind: AttentionKind | Annealed
) -> tuple[Int[jax.Array, "batch 2*length"], Slots]:
    """Returns rows twice as long (the clean tokens, then the targets again with noise), and their slots.

    Inputs that share a block with targets are repeated too: what sees noise must not see what the noise hides.
    """
    kind = kind.kind if isinstance(kind, Annealed) else kind
    clean, twice = Slots.of(batch), batch.target_mask
    if kind.blocks_from == "row":
        assert kind.block_size is not None
        first = first_targets(batch)
        twice = (batch.segment_ids > 0) & (batch.positions >= first - first % kind.block_size)
    nothing = jnp.zeros_like(batch.target_mask)
    slots = Slots(
        segment_ids=jnp.concatenate([clean.segment_ids, jnp.where(twice, clean.segment_ids, 0)], axis=1),
        positions=jnp.concatenate([clean.positions] * 2, axis=1),
        is_input=jnp.concatenate([clean.is_input, nothing], axis=1),
        is_noisy=jnp.concatenate([nothing, ~nothing], axis=1),
        index=jnp.tile(jnp.arange(noisy.shape[1]), 2)[None],
    )
    return jnp.concatenate([batch.tokens, noisy], axis=1), slots


def noisy_output(
    model: Transformer,
    reading: Reading,
    starts: IntBL,
    noisy: IntBL,
    kind: AttentionKind | Annealed,
    encoded: Encoded | None,
    dropout_keys: KeyB | None = None,
) -> Output:
    """Runs a pass whose hidden states predict noisy targets; these see everything before their block clean.

    Args:
      model: reads the clean tokens, and the noisy ones in the same pass.
      reading: reading of the batch.
      starts: see `block_starts`.
      noisy: the tokens, with noise in place of some targets.
      kind: "block_diffusion", or in transition to it.
      encoded: the inputs of an encoder-decoder.
      dropout_keys: a key for each row; None switches dropout off.
    """
    return read_twice(model, reading, starts, noisy, kind, encoded, dropout_keys)[0]


def read_twice(
    model: Transformer,
    reading: Reading,
    starts: IntBL,
    noisy: IntBL,
    kind: AttentionKind | Annealed,
    encoded: Encoded | None,
    dropout_keys: KeyB | None = None,
) -> tuple[Output, FloatBLD]:
    """Returns `noisy_output`, and the hidden states of the clean tokens, each in its token's slot."""
    check_blocks(kind, model.config.shifted)
    tokens, slots = clean_and_noisy(reading.batch, reading.tokens(noisy, model.vocabulary), kind)
    output, width = model(tokens, slots, kind, encoded, dropout_keys), reading.batch.tokens.shape[1]
    clean = output.hidden[:, :width]
    if reading.slot is not None:
        clean = jnp.take_along_axis(clean, jnp.minimum(reading.slot, width - 1)[..., None], axis=1)
    if not reading.shifted:
        return output.replace(hidden=output.hidden[:, width:]), clean
    # A block's first token is predicted in the clean slot before it, but not in its own.
    is_first = starts == jnp.arange(noisy.shape[1])
    if not model.vocabulary.reads_start:
        is_first &= reading.batch.positions > 0
    return output.replace(hidden=reading.states(output.hidden, jnp.where(is_first, 0, width))), clean
