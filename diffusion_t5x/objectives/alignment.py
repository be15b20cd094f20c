"""Block diffusion with hidden states trained to match those of its autoregressive start (arXiv 2605.06885).

The paper reports that this makes conversion four times cheaper. Its choice of layers and slots is not known; this uses
the last hidden states, from which both models compute logits.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.output import Ratio
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.block import Block
from diffusion_t5x.objectives.objective import LossSums, Pass, no_teacher, normalized
from diffusion_t5x.shapes import FloatBL, FloatBLD, IntScalar, KeyScalar


def cosine_distance(x: FloatBLD, y: FloatBLD) -> FloatBL:
    """Returns 1 - the cosine between hidden states, in float32: 0 to 2; 1 where either is zero."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    squares = jnp.sum(x * x, axis=-1) * jnp.sum(y * y, axis=-1)
    return 1 - jnp.sum(x * y, axis=-1) * jax.lax.rsqrt(jnp.maximum(squares, 1e-20))


@dataclasses.dataclass(frozen=True)
class Aligned(Block):
    """The loss of `Block` + `alignment_weight` * the distance of hidden states from the teacher's.

    The teacher, the frozen start, reads the clean text in one causal pass and computes no logits. Two kinds of
    states are trained to match its own, by cosine distance:

    * the one that predicts a masked target, to the one in which the teacher predicts the same token;
    * the one in the slot of a clean target, to the one in which the teacher has read the same token. A segment's last
      token is left out: the teacher does not read it.

    This is the same for a shifted student and one that predicts in place. The distances are summed over targets and
    divided by the denominator of the diffusion loss. Likelihoods are those of `Block`.

    Attributes:
      alignment_weight: weight of both distances.
    """

    alignment_weight: float = dataclasses.field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise != "mask":
            raise UserError(
                f'Aligned.noise must be "mask": only masked targets can match the teacher; got {self.noise!r}.'
            )
        if self.alignment_weight < 0:
            raise UserError(f"Aligned.alignment_weight must not be negative; got {self.alignment_weight}.")

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def passes(self) -> Sequence[Pass]:
        return (*super().passes, Pass(by_teacher=True, reads_out=False))

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar,
        train: bool = True,
        step: IntScalar | None = None,
        teacher: Transformer | None = None,
    ) -> LossSums:
        """Returns the loss of the student `model`."""
        if teacher is None:
            raise no_teacher(self)
        if (there := teacher.config.embed_dim) != (here := model.config.embed_dim):
            raise UserError(
                f"Aligned compares hidden states: the teacher's have {there} dimensions, the model's {here}. Set "
                "TEACHER_CHECKPOINT_PATH to the model's own start."
            )
        sums, read, masked = self._scored(model, batch, key, train, step)
        batch = read.batch
        taught = jax.lax.stop_gradient(Autoregressive().output(teacher, batch).hidden)
        after = jnp.pad(taught[:, 1:], ((0, 0), (0, 1), (0, 0)))
        segment_ids = jnp.asarray(batch.segment_ids)
        read_on = batch.target_mask & (jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1))) == segment_ids)

        noisy = jnp.where(masked, cosine_distance(read.output.hidden, taught), 0)
        clean = jnp.where(read_on, cosine_distance(read.clean, after), 0)
        distance = normalized(batch, noisy + clean, self.normalize)
        metrics = {
            "diffusion_loss": sums.loss,
            "noisy_distance": Ratio(jnp.sum(noisy), jnp.sum(masked, dtype=jnp.float32)),
            "clean_distance": Ratio(jnp.sum(clean), jnp.sum(read_on, dtype=jnp.float32)),
        }
        numerator = sums.loss.numerator + self.alignment_weight * distance.numerator
        return sums.replace(loss=Ratio(numerator, sums.loss.denominator), metrics=sums.metrics | metrics)
