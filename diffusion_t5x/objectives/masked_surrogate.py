"""The states in which policy gradients of masked models score the tokens of a text.

A text's probability has no closed form under a masked model, so the ratio of the trained model to the one that wrote
the text is taken token by token, in states in which the token is masked. The surrogates differ in these states:

* "trajectory": the states in which the decoder drew the tokens (TraceRL, arXiv 2509.06949).
* "one_step": all targets of the region are masked (diffu-GRPO, arXiv 2504.12216).
* "coupled": a random mask and its complement, so that each token is masked in one of two (coupled-GRPO, arXiv
  2506.20639).

Each is stored as a trajectory, `Batch.written_at`: the number of the state in which a token is scored. A region is what
a decoder writes in steps of its own: a block of targets, or all targets of a text.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.readout import LossSoftmax
from diffusion_t5x.models.sampling import forbid
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.objectives.clipped import ClippedSurrogate, Scores, scores_of
from diffusion_t5x.objectives.objective import LossSums, Pass, stratified
from diffusion_t5x.objectives.regions import InRegions
from diffusion_t5x.shapes import FloatBL, IntBL, IntScalar, KeyScalar

Surrogate = Literal["trajectory", "one_step", "coupled"]


@dataclasses.dataclass(frozen=True)
class MaskedSurrogate(ClippedSurrogate, InRegions):
    """The clipped surrogate of the tokens of a text, each in a state in which it is masked.

    Attributes:
      surrogate: the states in which tokens are scored, see above. The last two suit any decoder of masks, also one that
        draws no samples of the model, and are not exact with any.
      draws: number of states of each region that one training step reads, each in a row of its own: drawn without
        replacement, weighted so that the loss is that of all states on average. As many as a region has steps are
        exact.
      softmax: what the loss is over, see `Masked`.
      clip, normalize, entropy_weight: see `ClippedSurrogate`.
      kl_weight: likewise. Of a trajectory the divergences add up to that of the two ways to write; as in GRPO, the
        gradient leaves out that other tokens lead to other states.
    """

    surrogate: Surrogate = "trajectory"
    draws: int = 1
    softmax: LossSoftmax = dataclasses.field(default="allowed", kw_only=True)

    def check_settings(self) -> None:
        super().check_settings()
        name = type(self).__name__
        if self.draws < 1:
            raise UserError(f"{name}.draws must be at least 1; got {self.draws}.")
        if self.surrogate == "trajectory" and self.softmax != "allowed":
            raise UserError(
                f'{name}.softmax must be "allowed" for the surrogate "trajectory": decoders draw from nothing else. '
                "Set LOSS_SOFTMAX."
            )

    @property
    def needs_samples(self) -> bool:
        return self.surrogate == "trajectory"

    @property
    def passes(self) -> Sequence[Pass]:
        slots = self.slots_read
        taught = (Pass(slots=slots, by_teacher=True),) if self.needs_teacher else ()
        return (Pass(slots=slots), *taught) * self.draws

    def prepare_rollout(self, model: Transformer, batch: Batch, key: KeyScalar) -> Batch:
        """Returns texts with the states of the surrogate, and their tokens' log-probabilities in them."""
        assert batch.written_at is not None
        if self.surrogate == "trajectory":
            return batch
        state = jnp.zeros_like(batch.tokens)
        if self.surrogate == "coupled":
            share = stratified(stream(key, "time"), batch.example_ids, self.starts(batch))
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
          num_states: number of states of a region; each takes a pass.
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
        self.check_judged(batch, teacher)
        number = jnp.tile(jnp.arange(self.draws), len(batch.tokens))
        batch = jax.tree.map(lambda x: jnp.repeat(x, self.draws, axis=0), batch)
        state, weight = self._drawn_states(batch, key, number)
        scores = self._scores(model, batch, state, teacher if self.needs_teacher else None)
        scores = scores._replace(scored=scores.scored & (weight > 0))
        return self.clipped_loss(model, batch, scores, weight)

    def _drawn_states(self, batch: Batch, key: KeyScalar, number: jax.Array) -> tuple[IntBL, FloatBL]:
        """Returns the state that a row reads of each slot's region, and the weight of its tokens; 0: none is left.

        Args:
          batch: texts with `written_at`.
          key: rows draw the first state of each region from it by their `example_ids`; the others follow in turn.
          number: of each row among those of its text.
        """
        starts, length = self.starts(batch), batch.tokens.shape[1]
        at = jnp.where(batch.target_mask, jnp.asarray(batch.written_at), -1)
        last = jax.vmap(lambda at, starts: jax.ops.segment_max(at, starts, length)[starts])(at, starts)
        states = jnp.maximum(last + 1, 1)
        keys = row_keys(stream(key, "states"), batch.example_ids)
        draws = jax.vmap(lambda key: jax.random.uniform(key, (length,), jnp.float32))(keys)
        first = jnp.floor(jnp.take_along_axis(draws, starts, axis=-1) * states).astype(jnp.int32)
        weight = self.draws * states / jnp.minimum(self.draws, states)
        return (first + number[:, None]) % states, jnp.where(number[:, None] < states, weight, 0)

    def _masked(self, vocabulary: TokenIds, batch: Batch, state: IntBL) -> IntBL:
        """Returns the tokens as they are read in a state of each region."""
        assert batch.written_at is not None
        at = jnp.asarray(batch.written_at)
        masked = at == state if self.surrogate == "coupled" else at >= state
        return jnp.where(batch.target_mask & (at >= 0) & masked, vocabulary.mask_id, batch.tokens)

    def _scores(self, model: Transformer, batch: Batch, state: IntBL, start: Transformer | None = None) -> Scores:
        """Returns the scores of the tokens that are scored in a state of each region.

        Args:
          model: reads the state.
          batch: texts with `written_at`.
          state: number of the state that each slot's region is in.
          start: another model, for `kl_from_start`.
        """
        noisy = self._masked(model.vocabulary, batch, state)
        kept, output = self.read(model, batch, noisy)
        of_start = None if start is None else self.read(start, batch, noisy)[1].hidden
        scored = kept.target_mask & (jnp.asarray(batch.written_at) == state)
        return scores_of(model, output, batch.tokens, scored, start, of_start, self._allowed)

    def _allowed(
        self, logits: Float[jax.Array, "*shape vocab"], model: Transformer
    ) -> Float[jax.Array, "*shape vocab"]:
        """Returns the logits whose softmax the loss is about."""
        return forbid(logits, model.vocabulary) if self.softmax == "allowed" else logits
