"""The protocol of objectives, and the code that they share."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Protocol, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import AttentionKind
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.output import Auxiliaries, Ratio, merged
from diffusion_t5x.models.transformer import ModelDefinition, Transformer
from diffusion_t5x.shapes import AnyIntBL, Array, FloatB, FloatBL, FloatScalar, IntB, IntBL, IntScalar, KeyScalar

Normalize = Literal["target_tokens", "all_tokens", "sequences"]

# The fractions of the golden ratio and of the square root of two, in units of 2^-32.
GOLDEN_RATIO, SQUARE_ROOT_OF_TWO = np.uint32(0x9E3779B9), np.uint32(0x6A09E667)


class LossSums(flax.struct.PyTreeNode):
    """An objective's loss and metrics on a batch.

    Attributes:
      loss: the objective's own loss.
      metrics: logged metrics, by name.
      auxiliary: the model's own losses, see `Output.auxiliary`; they are added to the objective's loss, and logged.
    """

    loss: Ratio
    metrics: dict[str, Ratio]
    auxiliary: Auxiliaries = flax.struct.field(default_factory=dict)

    def __add__(self, other: Self) -> Self:
        metrics = {name: ratio + other.metrics[name] for name, ratio in self.metrics.items()}
        return type(self)(self.loss + other.loss, metrics, merged(self.auxiliary, other.auxiliary))

    @property
    def _minimised(self) -> Auxiliaries:
        return {name: aux for name, aux in self.auxiliary.items() if not aux.per_layer}

    def total(self) -> FloatScalar:
        """Returns the minimised loss: the objective's mean plus the weighted means of the auxiliary losses."""
        return sum((aux.weight * aux.ratio.mean() for aux in self._minimised.values()), start=self.loss.mean())

    def denominators(self) -> dict[str, FloatScalar]:
        """Returns the denominators of the terms of `total`: "loss" for the objective, then the auxiliary losses."""
        return {"loss": self.loss.denominator, **{name: aux.ratio.denominator for name, aux in self._minimised.items()}}

    def total_numerator(self, denominators: Mapping[str, FloatScalar]) -> FloatScalar:
        """Returns a microbatch's share of the batch's `total`, times the batch's denominator of the objective's loss.

        Args:
          denominators: those of the whole batch.
        """
        over = {name: jax.lax.stop_gradient(jnp.where(x == 0, 1, x)) for name, x in denominators.items()}
        shares = (
            aux.weight * aux.ratio.numerator * (over["loss"] / over[name]) for name, aux in self._minimised.items()
        )
        return sum(shares, start=self.loss.numerator)


@dataclasses.dataclass(frozen=True)
class Pass:
    """One decoder pass over a batch in `Objective.loss`, for counting FLOPs.

    Attributes:
      slots: number of slots read per slot of the batch. Logits are computed for one of them at most.
      encodes: an encoder-decoder's inputs also pass through the encoder.
      reads_out: logits are computed from its hidden states.
      by_teacher: the pass is the teacher's, without gradients; the model's own, if it teaches itself.
    """

    slots: int = 1
    encodes: bool = True
    reads_out: bool = True
    by_teacher: bool = False


class Likelihood(flax.struct.PyTreeNode):
    """Log-likelihood of each row's targets, given its inputs.

    Attributes:
      log_likelihood: in nats: exact, or an unbiased estimate of a lower bound; the objective says which.
      standard_error: standard error of that estimate, from the spread of its own draws; 0 if nothing is drawn.
      num_tokens: number of tokens in the text: its targets up to the one that ends it.
    """

    log_likelihood: FloatB
    standard_error: FloatB
    num_tokens: IntB


class Objective(Protocol):
    """A frozen dataclass that corrupts clean tokens on device and scores the model on them.

    Objectives derive from this class and declare what differs from its defaults.

    Attributes:
      autoregressive: predicts each token from those before it, with causal or prefix attention, whatever
        `ModelConfig.shifted` says.
      needs_teacher: the loss needs a teacher, an autoregressive one unless `taught_by_start`.
      taught_by_start: the teacher is the run's initial checkpoint, read as the model itself is.
      trains_drafts: trains only drafts, with `Lora.drafts_only`.
      reads_pairs: the rows of its loss are preference pairs, see `data.pair_source`.
      takes_rollouts: can learn from texts that the model itself wrote, in the first of `modes`, and may read
        `Batch.written_at`.
      needs_rollouts: learns only from such texts.
      needs_rewards: learns from their advantages, `Batch.advantage`.
      needs_samples: assumes that their tokens are samples from the model, see `RowDecoder.samples_model`.
      normalize: denominator of the summed loss, see `normalized`.
    """

    autoregressive: ClassVar[bool] = False
    trains_drafts: ClassVar[bool] = False
    reads_pairs: ClassVar[bool] = False
    takes_rollouts: ClassVar[bool] = False

    @property
    def needs_teacher(self) -> bool:
        return False

    @property
    def taught_by_start(self) -> bool:
        return False

    @property
    def needs_rollouts(self) -> bool:
        return False

    @property
    def needs_rewards(self) -> bool:
        return False

    @property
    def needs_samples(self) -> bool:
        return False

    @property
    def normalize(self) -> Normalize:
        return "target_tokens"

    @property
    def attention(self) -> AttentionKind:
        """The attention kind of this objective."""

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes that it trains a model for; its likelihood is that of the first. () if not declared."""
        return ()

    @property
    def passes(self) -> Sequence[Pass]:
        """The passes of one call of `loss`."""

    def model_inputs(self, model: ModelDefinition, batch: Batch, key: KeyScalar) -> IntBL:
        """Returns the model's first input in `loss` with this key: shifted, corrupted, or both.

        Contains only the slots that predict tokens.
        """

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar,
        train: bool = True,
        step: IntScalar | None = None,
        teacher: Transformer | None = None,
    ) -> LossSums:
        """Returns the loss of a batch.

        Args:
          model: reads the corrupted batch.
          batch: clean tokens.
          key: rows draw from it by their `example_ids`.
          train: switches dropout on.
          step: training steps taken before, for anything that changes during training; None means after the end.
          teacher: the teacher of objectives that need one; without dropout or gradients.
        """

    def prepare_rollout(self, model: Transformer, batch: Batch, key: KeyScalar) -> Batch:
        """Returns texts that the model has just written with what `loss` will need of this model; here, as they are.

        Args:
          model: wrote the texts.
          batch: the texts, with `written_at`.
          key: rows draw from it by their `example_ids`.
        """
        return batch

    def log_likelihood(self, model: Transformer, batch: Batch, key: KeyScalar, num_draws: int) -> Likelihood:
        """Returns log-likelihoods of rows with one example each, as in evaluation; a packed row counts as one example.

        Rows draw from the key by their `example_ids`: a row has the same random numbers alone and in any batch.

        Args:
          model: without dropout.
          batch: clean tokens.
          key: key of the draws.
          num_draws: number of draws, an even number; exact objectives ignore it and take one pass.
        """


def no_teacher(objective: Objective) -> UserError:
    """Returns the error of an objective that lacks the teacher it needs."""
    if objective.taught_by_start:
        return UserError(f"{type(objective).__name__} is held near its start. Set INITIAL_CHECKPOINT_PATH.")
    return UserError(f"{type(objective).__name__} needs a teacher. Set TEACHER_CHECKPOINT_PATH.")


def stratified(key: KeyScalar, rows: Int[Array, " batch"], columns: AnyIntBL) -> FloatBL:
    """Returns numbers, each uniform in [0, 1), together more evenly spread than independent ones.

    A number is `frac(u + row * golden ratio + column * sqrt(2))` with one uniform u: an additive recurrence, whose
    neighbouring terms fill [0, 1) evenly. It does not depend on the number of rows, so a row has the same number in a
    microbatch, on a device and in the whole batch. Integer arithmetic makes it exact for any id.

    Args:
      key: u is drawn from it.
      rows: example ids.
      columns: positions with the same value (a segment's, say) share a number.
    """
    u = jax.random.bits(key, dtype=jnp.uint32)
    rows, columns = jnp.asarray(rows, jnp.uint32)[:, None], jnp.asarray(columns, jnp.uint32)
    bits = u + rows * GOLDEN_RATIO + columns * SQUARE_ROOT_OF_TWO
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def normalized(batch: Batch, loss: Shaped[Array, "batch length"], normalize: Normalize) -> Ratio:
    """Returns the sum of a loss over target positions, and its denominator.

    Args:
      batch: defines the target positions.
      loss: loss of every position, or bool; values elsewhere are ignored.
      normalize: "target_tokens" makes the mean over target positions, "all_tokens" divides by all positions, padding
        too, "sequences" makes the mean over sequences (packed ones counted one by one) of each one's mean (T5X's
        NUM_REAL_TARGET_TOKENS, NUM_TOTAL_TARGET_TOKENS and AVERAGE_PER_SEQUENCE).
    """
    weights = batch.target_mask.astype(jnp.float32)
    if normalize == "all_tokens":
        return Ratio(jnp.sum(loss * weights), jnp.float32(weights.size))
    if normalize == "sequences":
        same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None, :]
        targets = jnp.sum(jnp.where(same, weights[:, None, :], 0), axis=-1)
        weights = weights / jnp.maximum(targets, 1)
    return Ratio(jnp.sum(loss * weights), jnp.sum(weights))
