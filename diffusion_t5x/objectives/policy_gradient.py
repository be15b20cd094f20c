"""Policy gradients for block diffusion: GRPO's clipped surrogate (arXiv 2402.03300) on texts that the model wrote.

`masked_surrogate` describes the states of a block in which its tokens are scored.
"""

import dataclasses

from diffusion_t5x.objectives.masked_surrogate import MaskedSurrogate
from diffusion_t5x.objectives.regions import BlockRegions


@dataclasses.dataclass(frozen=True)
class PolicyGradient(MaskedSurrogate, BlockRegions):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_settings()
