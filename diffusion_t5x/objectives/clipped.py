"""PPO's clipped surrogate, as GRPO uses it (arXiv 2402.03300), given the probabilities of what the model wrote."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import text_of
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.output import Auxiliaries, Output, Ratio
from diffusion_t5x.models.readout import cross_entropy
from diffusion_t5x.models.sampling import forbid
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.objectives.divergences import divergence, entropy
from diffusion_t5x.objectives.objective import LossSums, Normalize, Objective, no_teacher, normalized
from diffusion_t5x.shapes import AnyBoolBL, AnyIntBL, FloatBL, FloatBLD

Allowed = Callable[[jax.Array, Transformer], jax.Array]


class Scores(NamedTuple):
    """Values that the loss reads of each token, 0 where none is scored.

    Attributes:
      log_probability: of the token, in nats.
      entropy: of the model's distribution, in nats.
      kl_from_start: divergence of the model's distribution from the start's, in nats; 0 without a start.
      scored: which tokens are.
      auxiliary: the model's own losses.
    """

    log_probability: FloatBL
    entropy: FloatBL
    kl_from_start: FloatBL
    scored: AnyBoolBL
    auxiliary: Auxiliaries


def only_allowed(logits: jax.Array, model: Transformer) -> jax.Array:
    """Returns the logits of the distribution that decoders draw from."""
    return forbid(logits, model.vocabulary)


def scores_of(
    model: Transformer,
    output: Output,
    tokens: AnyIntBL,
    scored: AnyBoolBL,
    start: Transformer | None = None,
    of_start: FloatBLD | None = None,
    allowed: Allowed = only_allowed,
) -> Scores:
    """Returns the scores of tokens.

    Args:
      model: computes the logits.
      output: its pass, whose hidden states predict the tokens.
      tokens: the tokens.
      scored: which of them are scored.
      start: another model, for `kl_from_start`.
      of_start: its hidden states.
      allowed: maps logits to those whose softmax the loss is about.
    """
    # What is not scored may be MASK, whose logarithm is infinite.
    labels = jnp.where(scored, tokens, model.vocabulary.noise_ranges[0][0])

    def read_out(logits, labels, of_start):
        mine = allowed(logits, model)
        nll, _ = cross_entropy(mine, labels)
        kl = jnp.zeros_like(nll)
        if start is not None:
            kl = divergence(jax.lax.stop_gradient(allowed(start.logits(of_start), start)), mine, "reverse_kl")
        return -nll, entropy(mine), kl

    of_start = None if of_start is None else jax.lax.stop_gradient(of_start)
    found = model.map_logits(read_out, output.hidden, labels, of_start)
    log_probability, surprise, kl = (jnp.where(scored, x, 0) for x in found)
    return Scores(log_probability, surprise, kl, scored, output.auxiliary)


def check_clip(name: str, clip: tuple[float, float]) -> None:
    """Raises a UserError if these are no limits below and above a ratio of 1."""
    if len(clip) != 2 or not 0 < clip[0] <= 1 or not clip[1] > 0:
        raise UserError(f"{name}.clip must be (low, high), low in (0, 1] and high above 0; got {clip}.")


def no_advantage(objective: Objective) -> UserError:
    """Returns the error of an objective that learns from rewards and gets other texts."""
    return UserError(
        f"{type(objective).__name__} has a loss only on texts that the model wrote and a reward judged: set "
        "train.rollout and its rewards, and no loss_evals."
    )


class Judged(Objective):
    """An objective of texts that the model wrote and a reward judged."""

    takes_rollouts: ClassVar[bool] = True

    @property
    def needs_rollouts(self) -> bool:
        return True

    @property
    def needs_rewards(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class ClippedSurrogate(Judged):
    """Minus the advantage of each token times its probability ratio, clipped as in PPO; without dropout.

    With r = p(token) / p(token when the text was written) and the text's advantage A, a token's loss is
    -min(r A, clip(r, 1 - low, 1 + high) A). Before the first update every r is 1 and the gradient is that of
    -A log p(token).

    Attributes:
      clip: (low, high); DAPO (arXiv 2503.14476) raises the latter.
      kl_weight: weight of KL(model || start) of each scored token in its state, exact over the vocabulary; the start is
        the run's initial checkpoint.
      entropy_weight: weight of the entropy of each scored token in its state, which is raised.
      normalize: "all_tokens" divides by a constant, so that long texts are not favoured (Dr. GRPO, arXiv 2503.20783);
        "sequences" averages over each text first (GRPO); "target_tokens" over all tokens of the batch (DAPO).
    """

    clip: tuple[float, float] = dataclasses.field(default=(0.2, 0.2), kw_only=True)
    normalize: Normalize = dataclasses.field(default="all_tokens", kw_only=True)
    kl_weight: float = dataclasses.field(default=0.0, kw_only=True)
    entropy_weight: float = dataclasses.field(default=0.0, kw_only=True)

    def check_settings(self) -> None:
        """Raises a UserError for settings out of range."""
        name = type(self).__name__
        check_clip(name, self.clip)
        if min(self.kl_weight, self.entropy_weight) < 0:
            raise UserError(
                f"{name}.kl_weight and entropy_weight must be at least 0; got {self.kl_weight} and "
                f"{self.entropy_weight}."
            )

    @property
    def needs_samples(self) -> bool:
        return True

    @property
    def needs_teacher(self) -> bool:
        return self.kl_weight > 0

    @property
    def taught_by_start(self) -> bool:
        return self.kl_weight > 0

    def check_judged(self, batch: Batch, teacher: Transformer | None) -> None:
        """Raises a UserError if the loss of a batch lacks its advantages, or the model near which it is held."""
        if batch.advantage is None:
            raise no_advantage(self)
        assert batch.written_at is not None and batch.written_log_probability is not None
        if self.needs_teacher and teacher is None:
            raise no_teacher(self)

    def clipped_loss(self, model: Transformer, batch: Batch, scores: Scores, weight: FloatBL | float = 1.0) -> LossSums:
        """Returns the loss and its metrics.

        Args:
          model: the trained model.
          batch: texts with advantages and the tokens' log-probabilities when they were written.
          scores: the tokens' scores now.
          weight: of each token's loss.
        """
        scored, written = scores.scored, batch.target_mask & (jnp.asarray(batch.written_at) >= 0)
        log_ratio = jnp.where(scored, scores.log_probability - jnp.asarray(batch.written_log_probability), 0)
        ratio, advantage = jnp.exp(log_ratio), jnp.asarray(batch.advantage)[:, None]
        low, high = self.clip
        free, clipped = ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage
        held = self.kl_weight * scores.kl_from_start - self.entropy_weight * scores.entropy
        loss = jnp.where(scored, weight * (held - jnp.minimum(free, clipped)), 0)
        count = jnp.sum(scored, dtype=jnp.float32)
        text = text_of(batch, model.vocabulary)

        def over_tokens(x):
            return Ratio(jnp.sum(jnp.where(scored, x, 0), dtype=jnp.float32), count)

        return LossSums(
            loss=normalized(batch.replace(target_mask=written), loss, self.normalize),
            metrics={
                "nll": over_tokens(-scores.log_probability),
                "entropy": over_tokens(scores.entropy),
                "ratio": over_tokens(ratio),
                "clip_fraction": over_tokens(clipped < free),
                "kl_from_writer": over_tokens(jnp.expm1(log_ratio) - log_ratio),
                "text_length": Ratio(*(jnp.sum(x, dtype=jnp.float32) for x in (text, jnp.any(text, axis=-1)))),
                **({"kl_from_start": over_tokens(scores.kl_from_start)} if self.needs_teacher else {}),
            },
            auxiliary=scores.auxiliary,
        )
