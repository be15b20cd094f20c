"""What every decoder is."""

from typing import Protocol, Self

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.objectives.objective import after_end


@flax.struct.dataclass
class Decoded:
    """What a decoder wrote.

    Attributes:
      tokens: int32 `[B, L]`, rows like the batch's with what was written at the target positions; what follows an
        end of sequence there is padding.
      scores: float32 `[B]`, the decoder's own measure of its output; its docstring says which, and which end is good.
      steps: int32 scalar, model steps taken (the prompt's not counted).
      row_steps: int32 `[B]`, those that a row took part in: as many as it would take alone.
      num_tokens: int32 `[B]`, the tokens of the output, with the one that ends it.
      canvas: int32 `[B, L]`, the tokens with all that was written behind an end as well.
      written_at: int32 `[B, L]`, the step in which a target got the token that it kept: counted from 0, in a decoder of
        blocks anew in each block; -1 where nothing was written.
      trace: int32 `[steps + 1, B, L]`, the rows before the first step and after each one; None unless asked for.
    """

    tokens: jax.Array
    scores: jax.Array
    steps: jax.Array
    row_steps: jax.Array
    num_tokens: jax.Array
    canvas: jax.Array
    written_at: jax.Array
    trace: jax.Array | None = None

    @classmethod
    def of(cls, canvas: jax.Array, batch: Batch, vocabulary: TokenIds, **fields: jax.Array | None) -> Self:
        """What was written into a batch's targets, ended where it ends."""
        text = batch.target_mask & ~after_end(canvas, batch, vocabulary)
        return cls(
            tokens=end_at_eos(canvas, batch, vocabulary),
            num_tokens=jnp.sum(text, axis=-1),
            canvas=canvas,
            **fields,
        )


class Decoder(Protocol):
    """A frozen dataclass that writes the targets of a batch. It never reads the tokens at target positions."""

    def decode(self, model: Transformer, batch: Batch, key: jax.Array, trace: bool = False) -> Decoded:
        """Rows draw from the key by their `example_ids`, so they do not depend on their neighbours."""


def end_at_eos(tokens: jax.Array, batch: Batch, vocabulary: TokenIds) -> jax.Array:
    """Rows `[B, L]` whose targets end at the first EOS or pad: the EOS stays, and all targets after are padding.

    Without EOS and pad the whole canvas is the output; with EOS or pad first it is empty.
    """
    return jnp.where(batch.target_mask & after_end(tokens, batch, vocabulary), vocabulary.pad_id, tokens)
