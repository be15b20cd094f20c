"""Policy gradients for SUNDAE models, whose decoder is a chain of canvases with known probabilities.

A step reads a canvas and draws all targets of the next one, each from the model's distribution given that canvas. The
first canvas is noise. So the probability of a chain is the product of those of its draws, and GRPO's clipped surrogate
(arXiv 2402.03300) of all draws has the gradient of the expected reward of the last canvas.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import BIDIRECTIONAL, AttentionKind
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.output import Output
from diffusion_t5x.models.reading import Reading, model_reads
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.models.transformer import ModelDefinition, Transformer
from diffusion_t5x.objectives.clipped import ClippedSurrogate, scores_of
from diffusion_t5x.objectives.objective import Likelihood, LossSums, Pass
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.shapes import FloatBL, IntBL, IntScalar, KeyScalar


@dataclasses.dataclass(frozen=True)
class SundaePolicyGradient(ClippedSurrogate):
    """The clipped surrogate of what the steps of a decoder drew, each given the canvas that it read.

    All targets count in each step, also those after the end of a text: the next step reads them.

    Attributes:
      draws: number of steps of each text that one training step reads, each in a row of its own: drawn without
        replacement, weighted so that the loss is that of all steps on average. As many as the decoder has are exact.
      clip, normalize, kl_weight, entropy_weight: see `ClippedSurrogate`.
    """

    draws: int = 1

    def __post_init__(self) -> None:
        self.check_settings()
        if self.draws < 1:
            raise UserError(f"SundaePolicyGradient.draws must be at least 1; got {self.draws}.")

    @property
    def attention(self) -> AttentionKind:
        return BIDIRECTIONAL

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (Mode.of(self.attention, "uniform"),)

    @property
    def passes(self) -> Sequence[Pass]:
        return (Pass(), *((Pass(by_teacher=True),) if self.needs_teacher else ())) * self.draws

    def model_inputs(self, model: ModelDefinition, batch: Batch, key: KeyScalar) -> IntBL:
        """The first of the canvases that `loss` reads."""
        read = self._drawn(batch, key, jnp.zeros(len(batch.tokens), jnp.int32))[0]
        return model_reads(read, batch, model)

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar,
        train: bool = True,
        step: IntScalar | None = None,
        teacher: Transformer | None = None,
    ) -> LossSums:
        self.check_judged(batch, teacher)
        number = jnp.tile(jnp.arange(self.draws), len(batch.tokens))
        batch = jax.tree.map(lambda x: jnp.repeat(x, self.draws, axis=0), batch)
        read, drawn, log_probability, weight = self._drawn(batch, key, number)
        batch = batch.replace(written_log_probability=log_probability)

        def output(reader: Transformer) -> Output:
            reading = Reading.of(batch, reader.vocabulary, reader.config.shifted)
            return reading.output(reader, read, self.attention, reader.encode(batch))

        start = teacher if self.needs_teacher else None
        scored = batch.target_mask & (weight > 0)
        of_start = None if start is None else output(start).hidden
        scores = scores_of(model, output(model), drawn, scored, start, of_start)
        return self.clipped_loss(model, batch, scores, weight)

    def log_likelihood(self, model: Transformer, batch: Batch, key: KeyScalar, num_draws: int) -> Likelihood:
        """A lower bound, see `Sundae`."""
        return Sundae().log_likelihood(model, batch, key, num_draws)

    def _drawn(self, batch: Batch, key: KeyScalar, number: jax.Array) -> tuple[IntBL, IntBL, FloatBL, jax.Array]:
        """Returns a step of each row: what it read and drew, the draws' log-probabilities, and the weight `[B, 1]`.

        Args:
          batch: texts with `canvases`.
          key: texts draw their first step from it by their `example_ids`; the others follow in turn.
          number: of each row among those of its text; from the number of steps on, its weight is 0.
        """
        assert batch.canvases is not None and batch.canvas_log_probability is not None
        canvases, rows = jnp.asarray(batch.canvases), jnp.arange(len(batch.tokens))
        steps = canvases.shape[1]
        keys = row_keys(stream(key, "states"), batch.example_ids)
        first = jax.vmap(lambda key: jax.random.randint(key, (), 0, steps))(keys)
        at = (first + number) % steps
        after = jnp.concatenate([canvases[:, 1:], jnp.asarray(batch.tokens)[:, None]], axis=1)
        weight = jnp.where(number < steps, self.draws * steps / min(self.draws, steps), 0)[:, None]
        return canvases[rows, at], after[rows, at], jnp.asarray(batch.canvas_log_probability)[rows, at], weight
