"""What every decoder is."""

from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.models.transformer import Transformer


@flax.struct.dataclass
class Decoded:
    """What a decoder wrote.

    Attributes:
      tokens: int32 `[B, L]`, rows like the batch's with what was written at the target positions; what follows an
        end of sequence there is padding.
      scores: float32 `[B]`, the decoder's own measure of its output; its docstring says which, and which end is good.
      steps: int32 scalar, model steps taken (the prompt's not counted).
      trace: int32 `[steps + 1, B, L]`, the rows before the first step and after each one; None unless asked for.
    """

    tokens: jax.Array
    scores: jax.Array
    steps: jax.Array
    trace: jax.Array | None = None


class Decoder(Protocol):
    """A frozen dataclass that writes the targets of a batch. It never reads the tokens at target positions."""

    def decode(self, model: Transformer, batch: Batch, key: jax.Array, trace: bool = False) -> Decoded:
        """Rows draw from the key by their `example_ids`, so they do not depend on their neighbours."""


def end_at_eos(tokens: jax.Array, batch: Batch, vocabulary: TokenIds) -> jax.Array:
    """Rows `[B, L]` whose targets end at the first EOS or pad: the EOS stays, and all targets after are padding.

    The one place where the length of an output is decided. Without EOS and pad the whole canvas is the output; with
    EOS or pad first it is empty.
    """
    ends = batch.target_mask & ((tokens == vocabulary.eos_id) | (tokens == vocabulary.pad_id))
    after_end = jnp.cumsum(ends, axis=-1) - ends > 0
    return jnp.where(batch.target_mask & after_end, vocabulary.pad_id, tokens)
