"""Policy gradients with evidence bounds of a text's likelihood: SPG (arXiv 2510.09541).

What becomes likelier has its lower bound raised, what becomes less likely its upper bound lowered: the two bounds hold
the likelihood between them. The likelihood is that of writing each region (a block, or the whole canvas) one token at a
time, in a random order: the mean over orders of the product of its tokens' probabilities, each given what is written
before.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import text_of
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError, check_choices
from diffusion_t5x.models.output import Auxiliaries, Ratio
from diffusion_t5x.models.readout import LossSoftmax, score
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.objectives.clipped import Judged, check_clip, no_advantage
from diffusion_t5x.objectives.likelihood import uniform
from diffusion_t5x.objectives.objective import LossSums, Normalize, Pass, normalized
from diffusion_t5x.objectives.regions import BlockRegions, CanvasRegions, InRegions
from diffusion_t5x.shapes import AnyBoolBL, FloatBL, IntBL, IntScalar, KeyScalar


@dataclasses.dataclass(frozen=True)
class Sandwiched(Judged, InRegions):
    """Minus a text's advantage times its probability ratio, clipped as in PPO; without dropout.

    The ratio is that of whole texts, per token: exp((bound - bound when the text was written) / number of tokens), of
    lower bounds. Its gradient is that of the lower bound for positive advantages. For negative ones it is that of the
    upper bound, mixed with the lower one. SPG itself has no ratio: its gradient is that of the first update here.

    States of a region are nested: its tokens are put into a random order, and the first k are seen, for some k. With n
    tokens, of which l are masked in a state, and p their probabilities there,

      lower bound = sum over tokens of the mean over states of n / l log p
      upper bound = sum over tokens of 1 / power log(the mean over states of n / l p^power)

    the means being over all k and orders; a token that is not masked adds nothing to its mean. The lower bound is
    LLaDA's. The upper one holds for a power of at least n, by Hoelder's inequality. The logarithm of a mean over few
    states is too low on average, so what one text gives is a biased estimate of it, as in SPG.

    Attributes:
      draws: number of states of each region, with different k of one order, each read in a row of its own. They are
        drawn when the text is written. As many as a region has tokens are all of them. From 1, both bounds have the
        same gradient.
      upper_weight: share of the upper bound for negative advantages; the rest is the lower one's. 0 takes the lower
        bound for all texts, 1 the upper one alone.
      power: SPG's beta, at least 1, of the probabilities in the upper bound; None: the most tokens that a region
        may have, which makes it one.
      clip: (low, high) for the ratio.
      normalize: as in `PolicyGradient`; a text's loss counts once for each of its tokens.
      softmax: what the loss is over, see `Masked`.
    """

    draws: int = 2
    upper_weight: float = 0.5
    power: float | None = None
    clip: tuple[float, float] = (0.2, 0.2)
    normalize: Normalize = "all_tokens"
    softmax: LossSoftmax = dataclasses.field(default="allowed", kw_only=True)

    def check_settings(self) -> None:
        """Raises a UserError for settings out of range."""
        name = type(self).__name__
        if self.draws < 1:
            raise UserError(f"{name}.draws must be at least 1; got {self.draws}.")
        if not 0 <= self.upper_weight <= 1:
            raise UserError(f"{name}.upper_weight must lie in [0, 1]; got {self.upper_weight}.")
        if self.power is not None and self.power < 1:
            raise UserError(f"{name}.power must be at least 1, or None; got {self.power}.")
        check_clip(name, self.clip)

    @property
    def passes(self) -> Sequence[Pass]:
        return (Pass(slots=self.slots_read),) * self.draws

    def prepare_rollout(self, model: Transformer, batch: Batch, key: KeyScalar) -> Batch:
        """Returns texts with the states of their regions, and the terms of the lower bound in them."""
        batch = batch.replace(written_at=self._states(batch, key))
        return batch.replace(written_log_probability=self.bounds(model, batch).lower)

    def noisy(self, vocabulary: TokenIds, batch: Batch, key: KeyScalar) -> IntBL:
        """The state of each region with the fewest masks."""
        return jnp.where(_masked_in(batch, 0), vocabulary.mask_id, batch.tokens)

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
        written = batch.target_mask & (jnp.asarray(batch.written_at) >= 0)
        count = jnp.sum(written, axis=-1)
        bounds = self.bounds(model, batch)
        lower, upper = (jnp.sum(x, axis=-1) / jnp.maximum(count, 1) for x in (bounds.lower, bounds.upper))
        before = jnp.sum(batch.written_log_probability, axis=-1) / jnp.maximum(count, 1)
        advantage = jnp.asarray(batch.advantage)
        bound = lower + jnp.where(advantage < 0, self.upper_weight, 0) * (upper - lower)
        log_ratio = jax.lax.stop_gradient(lower) - before
        ratio = jnp.exp(log_ratio + bound - jax.lax.stop_gradient(bound))
        low, high = self.clip
        free, clipped = ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage
        loss = jnp.broadcast_to(-jnp.minimum(free, clipped)[:, None], written.shape)
        text = text_of(batch, model.vocabulary)

        def over_texts(x, per=count > 0):
            return Ratio(*(jnp.sum(where, dtype=jnp.float32) for where in (jnp.where(count > 0, x, 0), per)))

        return LossSums(
            loss=normalized(batch.replace(target_mask=written), loss, self.normalize),
            metrics={
                "nll_bound": over_texts(-lower * count, count),
                "ratio": over_texts(ratio),
                "clip_fraction": over_texts(clipped < free),
                "kl_from_writer": over_texts(jnp.expm1(log_ratio) - log_ratio),
                "text_length": Ratio(*(jnp.sum(x, dtype=jnp.float32) for x in (text, jnp.any(text, axis=-1)))),
            },
            auxiliary=bounds.auxiliary,
        )

    def bounds(self, model: Transformer, batch: Batch) -> "Bounds":
        """Returns the terms of both bounds.

        Args:
          model: reads the states.
          batch: texts with `written_at` as in `prepare_rollout`.
        """
        number = jnp.tile(jnp.arange(self.draws), len(batch.tokens))[:, None]
        rows = jax.tree.map(lambda x: jnp.repeat(x, self.draws, axis=0), batch)
        masked, weight = _masked_in(rows, number), self._weights(rows, number)
        kept, output = self.read(model, rows, jnp.where(masked, model.vocabulary.mask_id, rows.tokens))
        masked &= kept.target_mask & (weight > 0)
        # What is not scored may be MASK, whose logarithm is infinite.
        labels = jnp.where(masked, rows.tokens, model.vocabulary.noise_ranges[0][0])
        log_p = jnp.where(masked, -score(model, output.hidden, labels, self.softmax)[0], 0)

        def by_state(x):
            return x.reshape(-1, self.draws, x.shape[-1])

        masked, weight, log_p = by_state(masked), by_state(weight), by_state(log_p)
        power = jnp.reshape(jnp.asarray(self.most_targets(batch) if self.power is None else self.power), (-1, 1))
        terms = jnp.where(masked, jnp.log(jnp.where(masked, weight, 1)) + power[:, None] * log_p, -jnp.inf)
        ever = jnp.any(masked, axis=1)
        of_tokens = jax.nn.logsumexp(jnp.where(ever[:, None], terms, 0), axis=1) / power
        # A token that no state masks has no term. Those of the state with the most masks, l of n, stand for all.
        valid = weight > 0
        scale = jnp.sum(valid, axis=1) * jnp.min(jnp.where(valid, weight, jnp.inf), axis=1)
        return Bounds(
            lower=jnp.sum(weight * log_p, axis=1),
            upper=jnp.where(ever, of_tokens * scale, 0),
            auxiliary=output.auxiliary,
        )

    def _states(self, batch: Batch, key: KeyScalar) -> IntBL:
        """Returns the first state in which each written token is masked, `draws` where none is, and -1 elsewhere."""
        written = batch.target_mask & (jnp.asarray(batch.written_at) >= 0)
        starts = self._starts(batch)
        keys, length = row_keys(stream(key, "states"), batch.example_ids), batch.tokens.shape[1]
        orders, firsts = (uniform(stream(keys, name), length) for name in ("order", "first"))
        # Regions have no gaps, so each keeps its place when slots are sorted by region, and inside it by draw.
        rank = jnp.argsort(jnp.lexsort((jnp.where(written, orders, 1), starts)), axis=-1) - starts
        size = _of_regions(written, starts)
        first = jnp.floor(jnp.take_along_axis(firsts, starts, axis=-1) * size).astype(jnp.int32)
        number = jnp.arange(self.draws)[:, None, None]
        seen = (first + number) % jnp.maximum(size, 1)  # number of tokens that the state's order puts first
        hidden_in = jnp.sum((seen > rank) & (number < size), axis=0, dtype=jnp.int32)
        return jnp.where(written, hidden_in, -1)

    def _weights(self, batch: Batch, number: Int[jax.Array, "batch 1"]) -> FloatBL:
        """Returns n / l over the number of states of each slot's region, 0 where it has no state of this number."""
        starts = self._starts(batch)
        size = _of_regions(batch.target_mask & (jnp.asarray(batch.written_at) >= 0), starts)
        num_masked, num_states = _of_regions(_masked_in(batch, number), starts), jnp.minimum(size, self.draws)
        return jnp.where(number < num_states, size / jnp.maximum(num_masked * num_states, 1), 0)

    def _starts(self, batch: Batch) -> IntBL:
        """Returns the start of each target's region; other slots are regions of their own."""
        starts = self.starts(batch)
        return jnp.where(batch.target_mask, starts, jnp.arange(starts.shape[1]))


@dataclasses.dataclass(frozen=True)
class SandwichedPolicyGradient(Sandwiched, BlockRegions):
    """Policy gradients with evidence bounds for block diffusion, see `Sandwiched`.

    Attributes:
      block_size: number of targets per block, as in decoding.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_settings()


@dataclasses.dataclass(frozen=True)
class MaskedSandwichedPolicyGradient(Sandwiched, CanvasRegions):
    """Policy gradients with evidence bounds for masked models that write a whole canvas, see `Sandwiched`."""

    def __post_init__(self) -> None:
        check_choices(self)
        self.check_settings()


class Bounds(NamedTuple):
    """Terms of both bounds on the log-likelihood of texts, in nats; their sums over a row are the bounds.

    Attributes:
      lower, upper: of each token, 0 where none is scored.
      auxiliary: the model's own losses.
    """

    lower: FloatBL
    upper: FloatBL
    auxiliary: Auxiliaries


def _masked_in(batch: Batch, number: int | Int[jax.Array, "batch 1"]) -> AnyBoolBL:
    """Returns the tokens that are masked in the state of this number."""
    at = jnp.asarray(batch.written_at)
    return batch.target_mask & (at >= 0) & (at <= number)


def _of_regions(counted: AnyBoolBL, starts: IntBL) -> IntBL:
    """Returns how many slots of each slot's region are counted."""
    return jax.vmap(lambda x, at: jax.ops.segment_sum(x.astype(jnp.int32), at, x.size)[at])(counted, starts)
