"""Policy gradients for masked models that write a whole canvas: GRPO's clipped surrogate (arXiv 2402.03300).

`masked_surrogate` describes the states of the canvas in which its tokens are scored.
"""

import dataclasses

import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.errors import check_choices
from diffusion_t5x.models.masks import BIDIRECTIONAL, AttentionKind
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.output import Output
from diffusion_t5x.models.reading import Reading, model_reads
from diffusion_t5x.models.transformer import ModelDefinition, Transformer
from diffusion_t5x.objectives.blocks import block_starts
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.masked_surrogate import MaskedSurrogate
from diffusion_t5x.objectives.objective import Likelihood
from diffusion_t5x.shapes import IntBL, KeyScalar


@dataclasses.dataclass(frozen=True)
class MaskedPolicyGradient(MaskedSurrogate):
    """The clipped surrogate of all targets of a text, each in a state of the canvas in which it is masked.

    With "trajectory" and "all_tokens" the mean of its gradient over texts that the model has just written is
    proportional to that of the expected reward, if the decoder draws tokens from the model and picks their positions
    without the model: in the order "random" or "sequential", with any number of tokens per step.

    All targets count, also those after the end of a text: they were seen as the text was written.

    Attributes:
      surrogate: the states in which tokens are scored, see `MaskedSurrogate`.
      draws: number of states of each text that one training step reads, each in a row of its own; as many as the
        decoder has steps are exact.
      softmax, clip, normalize, kl_weight, entropy_weight: see `MaskedSurrogate`.
    """

    def __post_init__(self) -> None:
        check_choices(self)
        self.check_settings()

    @property
    def attention(self) -> AttentionKind:
        return BIDIRECTIONAL

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (Mode.of(self.attention, "mask"),)

    def model_inputs(self, model: ModelDefinition, batch: Batch, key: KeyScalar) -> IntBL:
        """The first of the states that `loss` reads."""
        return model_reads(self.noisy(model.vocabulary, batch, key), batch, model)

    def starts(self, batch: Batch) -> IntBL:
        return jnp.maximum(block_starts(batch, batch.tokens.shape[1]), 0)  # one block has room for the whole row

    def read(self, model: Transformer, batch: Batch, noisy: IntBL) -> tuple[Batch, Output]:
        reading = Reading.of(batch, model.vocabulary, model.config.shifted, packed=True)
        return reading.fits(batch), reading.output(model, noisy, self.attention, model.encode(batch))

    def log_likelihood(self, model: Transformer, batch: Batch, key: KeyScalar, num_draws: int) -> Likelihood:
        """A lower bound, see `Masked`."""
        return Masked().log_likelihood(model, batch, key, num_draws)
