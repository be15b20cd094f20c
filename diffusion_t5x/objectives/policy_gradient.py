"""Policy gradients for block diffusion: GRPO's clipped surrogate (arXiv 2402.03300) on texts that the model wrote.

`masked_surrogate` describes the states of a block in which its tokens are scored.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.models.output import Output
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.objectives.block import InBlocks
from diffusion_t5x.objectives.blocks import block_starts
from diffusion_t5x.objectives.masked_surrogate import MaskedSurrogate
from diffusion_t5x.shapes import IntBL


@dataclasses.dataclass(frozen=True)
class PolicyGradient(MaskedSurrogate, InBlocks):
    """The clipped surrogate of the tokens of a text, each in a state of its block in which it is masked.

    With "trajectory" and "all_tokens" the mean of its gradient over texts that the model has just written is
    proportional to that of the expected reward, if the decoder draws tokens from the model and picks their positions
    without the model: in the order "random" or "sequential", with any number of tokens per step.

    All tokens that the decoder wrote count, also those after the end of a text in its last block: they were seen as
    the text was written.

    Attributes:
      block_size: number of targets per block, as in decoding.
      surrogate: the states in which tokens are scored, see `MaskedSurrogate`.
      draws: number of states of each block that one training step reads, each in a row of its own; as many as a block
        has steps are exact.
      clip, normalize, kl_weight, entropy_weight: see `MaskedSurrogate`.
    """

    slots_read: ClassVar[int] = 2

    def __post_init__(self) -> None:
        InBlocks.__post_init__(self)
        self.check_settings()

    def starts(self, batch: Batch) -> IntBL:
        return jnp.maximum(block_starts(batch, self.block_size, self.blocks_from), 0)

    def read(self, model: Transformer, batch: Batch, noisy: IntBL) -> tuple[Batch, Output]:
        found = self.output(model, batch, noisy)
        return found.batch, found.output
