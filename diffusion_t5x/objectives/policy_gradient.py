"""Policy gradients for block diffusion: GRPO's clipped surrogate (arXiv 2402.03300) on texts that the model wrote.

A text's probability has no closed form under a masked model, so the ratio of the trained model to the one that wrote
the text is taken token by token, in states in which the token is masked. The surrogates differ in these states:

* "trajectory": the states in which the decoder drew the tokens (TraceRL, arXiv 2509.06949).
* "one_step": all of a block is masked (diffu-GRPO, arXiv 2504.12216).
* "coupled": a random mask and its complement, so that each token is masked in one of two (coupled-GRPO, arXiv
  2506.20639).

Each is stored as a trajectory, `Batch.written_at`: the number of the state in which a token is scored.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import text_of
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.output import Auxiliaries, Ratio
from diffusion_t5x.models.readout import cross_entropy
from diffusion_t5x.models.sampling import forbid
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.objectives.block import InBlocks, block_starts
from diffusion_t5x.objectives.divergences import divergence, entropy
from diffusion_t5x.objectives.objective import LossSums, Normalize, Objective, Pass, no_teacher, normalized, stratified
from diffusion_t5x.shapes import AnyBoolBL, FloatBL, IntBL, IntScalar, KeyScalar

Surrogate = Literal["trajectory", "one_step", "coupled"]


@dataclasses.dataclass(frozen=True)
class PolicyGradient(InBlocks):
    """Minus the advantage of each token times its probability ratio, clipped as in PPO; without dropout.

    With r = p(token) / p(token when the text was written) and the text's advantage A, a token's loss is
    -min(r A, clip(r, 1 - low, 1 + high) A). Before the first update every r is 1 and the gradient is that of
    -A log p(token). With "trajectory" and "all_tokens" its mean over texts is proportional to the gradient of the
    expected reward, if the decoder draws tokens from the model and picks their positions without the model: in the
    order "random" or "sequential", with any number of tokens per step.

    All tokens that the decoder wrote count, also those after the end of a text in its last block: they were seen as
    the text was written.

    Attributes:
      block_size: number of targets per block, as in decoding.
      surrogate: the states in which tokens are scored, see above. The last two suit any decoder of masked blocks, also
        one that draws no samples of the model, and are not exact with any.
      draws: number of states of each block that one training step reads, each in a row of its own: drawn without
        replacement, weighted so that the loss is that of all states on average. As many as a block has steps are exact.
      clip: (low, high); DAPO (arXiv 2503.14476) raises the latter.
      kl_weight: weight of KL(model || start) of each scored token in its state, exact over the vocabulary; the start is
        the run's initial checkpoint. Of a trajectory they add up to the divergence of the two ways to write; as in
        GRPO, the gradient leaves out that other tokens lead to other states.
      entropy_weight: weight of the entropy of each scored token in its state, which is raised.
      normalize: "all_tokens" divides by a constant, so that long texts are not favoured (Dr. GRPO, arXiv 2503.20783);
        "sequences" averages over each text first (GRPO); "target_tokens" over all tokens of the batch (DAPO).
    """

    takes_rollouts: ClassVar[bool] = True

    surrogate: Surrogate = "trajectory"
    draws: int = 1
    clip: tuple[float, float] = (0.2, 0.2)
    normalize: Normalize = "all_tokens"
    kl_weight: float = 0.0
    entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draws < 1:
            raise UserError(f"PolicyGradient.draws must be at least 1; got {self.draws}.")
        check_clip("PolicyGradient", self.clip)
        if min(self.kl_weight, self.entropy_weight) < 0:
            raise UserError(
                "PolicyGradient.kl_weight and entropy_weight must be at least 0; got "
                f"{self.kl_weight} and {self.entropy_weight}."
            )
        if self.surrogate == "trajectory" and self.softmax != "allowed":
            raise UserError(
                'PolicyGradient.softmax must be "allowed" for the surrogate "trajectory": decoders draw from nothing '
                "else. Set LOSS_SOFTMAX."
            )

    @property
    def needs_rollouts(self) -> bool:
        return True

    @property
    def needs_rewards(self) -> bool:
        return True

    @property
    def needs_samples(self) -> bool:
        return self.surrogate == "trajectory"

    @property
    def needs_teacher(self) -> bool:
        return self.kl_weight > 0

    @property
    def taught_by_start(self) -> bool:
        return self.kl_weight > 0

    @property
    def passes(self) -> Sequence[Pass]:
        taught = (Pass(slots=2, by_teacher=True),) if self.needs_teacher else ()
        return (Pass(slots=2), *taught) * self.draws

    def prepare_rollout(self, model: Transformer, batch: Batch, key: KeyScalar) -> Batch:
        """Returns texts with the states of the surrogate, and their tokens' log-probabilities in them."""
        assert batch.written_at is not None
        if self.surrogate == "trajectory":
            return batch
        state = jnp.zeros_like(batch.tokens)
        if self.surrogate == "coupled":
            starts = jnp.maximum(block_starts(batch, self.block_size, self.blocks_from), 0)
            share = stratified(stream(key, "time"), batch.example_ids, starts)
            keys = row_keys(stream(key, "where"), batch.example_ids)
            draws = jax.vmap(lambda key: jax.random.uniform(key, batch.tokens.shape[1:], jnp.float32))(keys)
            state = (draws < share).astype(jnp.int32)
        batch = batch.replace(written_at=jnp.where(jnp.asarray(batch.written_at) >= 0, state, -1))
        num_states = 2 if self.surrogate == "coupled" else 1
        return batch.replace(written_log_probability=self.log_probabilities(model, batch, num_states))

    def log_probabilities(self, model: Transformer, batch: Batch, num_states: int) -> FloatBL:
        """Returns the log-probability of each written token in the state in which it is scored, 0 elsewhere.

        Args:
          model: reads the states.
          batch: texts with `written_at`, of the surrogate's states.
          num_states: number of states of a block; each takes a pass.
        """
        total = jnp.zeros(batch.tokens.shape, jnp.float32)
        for number in range(num_states):
            total += self._scores(model, batch, jnp.full_like(batch.tokens, number)).log_probability
        return total

    def noisy(self, vocabulary: TokenIds, batch: Batch, key: KeyScalar) -> IntBL:
        """The first of the states that `loss` reads."""
        return self._masked(
            vocabulary, batch, self._drawn_states(batch, key, jnp.zeros(len(batch.tokens), jnp.int32))[0]
        )

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar,
        train: bool = True,
        step: IntScalar | None = None,
        teacher: Transformer | None = None,
    ) -> LossSums:
        if batch.advantage is None:
            raise no_advantage(self)
        assert batch.written_at is not None and batch.written_log_probability is not None
        if self.needs_teacher and teacher is None:
            raise no_teacher(self)
        number = jnp.tile(jnp.arange(self.draws), len(batch.tokens))
        batch = jax.tree.map(lambda x: jnp.repeat(x, self.draws, axis=0), batch)
        state, weight = self._drawn_states(batch, key, number)
        scores = self._scores(model, batch, state, teacher if self.needs_teacher else None)
        scored = scores.scored & (weight > 0)
        log_ratio = jnp.where(scored, scores.log_probability - jnp.asarray(batch.written_log_probability), 0)
        ratio, advantage = jnp.exp(log_ratio), jnp.asarray(batch.advantage)[:, None]
        low, high = self.clip
        free, clipped = ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage
        written = batch.replace(target_mask=batch.target_mask & (jnp.asarray(batch.written_at) >= 0))
        held = self.kl_weight * scores.kl_from_start - self.entropy_weight * scores.entropy
        loss = jnp.where(scored, weight * (held - jnp.minimum(free, clipped)), 0)
        count = jnp.sum(scored, dtype=jnp.float32)
        text = text_of(batch, model.vocabulary)

        def over_tokens(x):
            return Ratio(jnp.sum(jnp.where(scored, x, 0), dtype=jnp.float32), count)

        return LossSums(
            loss=normalized(written, loss, self.normalize),
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

    def _drawn_states(self, batch: Batch, key: KeyScalar, number: jax.Array) -> tuple[IntBL, FloatBL]:
        """Returns the state that a row reads of each slot's block, and the weight of its tokens; 0: none is left.

        Args:
          batch: texts with `written_at`.
          key: rows draw the first state of each block from it by their `example_ids`; the others follow in turn.
          number: of each row among those of its text.
        """
        starts = jnp.maximum(block_starts(batch, self.block_size, self.blocks_from), 0)
        length = batch.tokens.shape[1]
        at = jnp.where(batch.target_mask, jnp.asarray(batch.written_at), -1)
        last = jax.vmap(lambda at, starts: jax.ops.segment_max(at, starts, length)[starts])(at, starts)
        states = jnp.maximum(last + 1, 1)
        keys = row_keys(stream(key, "states"), batch.example_ids)
        draws = jax.vmap(lambda key: jax.random.uniform(key, (length,), jnp.float32))(keys)
        first = jnp.floor(jnp.take_along_axis(draws, starts, axis=-1) * states).astype(jnp.int32)
        weight = self.draws * states / jnp.minimum(self.draws, states)
        return (first + number[:, None]) % states, jnp.where(number[:, None] < states, weight, 0)

    def _masked(self, vocabulary: TokenIds, batch: Batch, state: IntBL) -> IntBL:
        """Returns the tokens as they are read in a state of each block."""
        assert batch.written_at is not None
        at = jnp.asarray(batch.written_at)
        masked = at == state if self.surrogate == "coupled" else at >= state
        return jnp.where(batch.target_mask & (at >= 0) & masked, vocabulary.mask_id, batch.tokens)

    def _scores(self, model: Transformer, batch: Batch, state: IntBL, start: Transformer | None = None) -> "_Scores":
        """Returns the scores of the tokens that are scored in a state of each block.

        Args:
          model: reads the state.
          batch: texts with `written_at`.
          state: number of the state that each slot's block is in.
          start: another model, for `kl_from_start`.
        """
        noisy = self._masked(model.vocabulary, batch, state)
        kept, output, _ = self.output(model, batch, noisy)
        of_start = None if start is None else jax.lax.stop_gradient(self.output(start, batch, noisy).output.hidden)
        scored = kept.target_mask & (jnp.asarray(batch.written_at) == state)
        # What is not scored may be MASK, whose logarithm is infinite.
        labels = jnp.where(scored, batch.tokens, model.vocabulary.noise_ranges[0][0])

        def read_out(logits, labels, of_start):
            allowed = self._allowed(logits, model)
            nll, _ = cross_entropy(allowed, labels)
            kl = jnp.zeros_like(nll)
            if start is not None:
                kl = divergence(
                    jax.lax.stop_gradient(self._allowed(start.logits(of_start), start)), allowed, "reverse_kl"
                )
            return -nll, entropy(allowed), kl

        found = model.map_logits(read_out, output.hidden, labels, of_start)
        log_probability, surprise, kl = (jnp.where(scored, x, 0) for x in found)
        return _Scores(log_probability, surprise, kl, scored, output.auxiliary)

    def _allowed(
        self, logits: Float[jax.Array, "*shape vocab"], model: Transformer
    ) -> Float[jax.Array, "*shape vocab"]:
        """Returns the logits whose softmax the loss is about."""
        return forbid(logits, model.vocabulary) if self.softmax == "allowed" else logits


def check_clip(name: str, clip: tuple[float, float]) -> None:
    """Raises a UserError if this is no pair of limits below and above a ratio of 1."""
    if len(clip) != 2 or not 0 < clip[0] <= 1 or not clip[1] > 0:
        raise UserError(f"{name}.clip must be (low, high), low in (0, 1] and high above 0; got {clip}.")


def no_advantage(objective: Objective) -> UserError:
    """Returns the error of an objective that learns from rewards and gets other texts."""
    return UserError(
        f"{type(objective).__name__} has a loss only on texts that the model wrote and a reward judged: set "
        "train.rollout and its rewards, and no loss_evals."
    )


class _Scores(NamedTuple):
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
