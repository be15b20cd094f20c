"""Policy gradients for masked models that write a whole canvas: GRPO's clipped surrogate (arXiv 2402.03300).

`masked_surrogate` describes the states of the canvas in which its tokens are scored.
"""

import dataclasses

from diffusion_t5x.errors import check_choices
from diffusion_t5x.objectives.masked_surrogate import MaskedSurrogate
from diffusion_t5x.objectives.regions import CanvasRegions


@dataclasses.dataclass(frozen=True)
class MaskedPolicyGradient(MaskedSurrogate, CanvasRegions):
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
