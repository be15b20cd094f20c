"""Policy gradients for autoregressive models, whose texts have exact probabilities (GRPO, arXiv 2402.03300)."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.models.modes import LeftToRight
from diffusion_t5x.models.transformer import ModelDefinition, Transformer
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.clipped import ClippedSurrogate, scores_of
from diffusion_t5x.objectives.objective import Likelihood, LossSums, Pass
from diffusion_t5x.shapes import IntBL, IntScalar, KeyScalar


@dataclasses.dataclass(frozen=True)
class AutoregressivePolicyGradient(LeftToRight, ClippedSurrogate):
    """The clipped surrogate of the tokens of a text, each given those before it.

    With "all_tokens" the mean of its gradient over texts that the model has just written is proportional to that of the
    expected reward.

    Attributes:
      prefix: bidirectional attention over inputs, see `Autoregressive`.
      clip, normalize, kl_weight, entropy_weight: see `ClippedSurrogate`.
    """

    autoregressive: ClassVar[bool] = True

    prefix: bool = False

    def __post_init__(self) -> None:
        self.check_settings()

    @property
    def passes(self) -> Sequence[Pass]:
        return (Pass(), *((Pass(by_teacher=True),) if self.needs_teacher else ()))

    def model_inputs(self, model: ModelDefinition, batch: Batch, key: KeyScalar) -> IntBL:
        return self._likelihood.model_inputs(model, batch, key)

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar,
        train: bool = True,
        step: IntScalar | None = None,
        teacher: Transformer | None = None,
    ) -> LossSums:
        """Returns the loss of texts that the model wrote; nothing is drawn."""
        self.check_judged(batch, teacher)
        start = teacher if self.needs_teacher else None
        of_start = None if start is None else self._likelihood.output(start, batch).hidden
        scored = batch.target_mask & (jnp.asarray(batch.written_at) >= 0)
        output = self._likelihood.output(model, batch)
        return self.clipped_loss(model, batch, scores_of(model, output, batch.tokens, scored, start, of_start))

    def log_likelihood(self, model: Transformer, batch: Batch, key: KeyScalar | None, num_draws: int) -> Likelihood:
        """Exact, see `Autoregressive`."""
        return self._likelihood.log_likelihood(model, batch, key, num_draws)

    @property
    def _likelihood(self) -> Autoregressive:
        return Autoregressive(self.prefix)
