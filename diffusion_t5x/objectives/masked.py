"""Masked (absorbing) diffusion: predicts masked targets, for any share of masks.

MDLM (arXiv 2406.07524, section 3) and LLaDA (arXiv 2502.09992, section 2).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError, check_choices
from diffusion_t5x.models.layers import fold_in
from diffusion_t5x.models.masks import BIDIRECTIONAL, AttentionKind
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.output import Auxiliaries, Output, Ratio
from diffusion_t5x.models.reading import Reading, model_reads
from diffusion_t5x.models.readout import LossSoftmax, score
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.models.transformer import ModelDefinition, Transformer
from diffusion_t5x.objectives.annealing import annealed, check_anneal_steps
from diffusion_t5x.objectives.likelihood import masked_bound
from diffusion_t5x.objectives.objective import Likelihood, LossSums, Normalize, Objective, Pass, normalized, stratified
from diffusion_t5x.shapes import AnyBoolBL, BoolBL, FloatBL, IntBL, IntScalar, KeyB, KeyScalar

Schedule = Literal["linear", "cosine"]
Weighting = Literal["elbo", "uniform"]


def linear(t: FloatBL) -> tuple[FloatBL, FloatBL]:
    """The probability t of a mask at time t, and the bound's weight of a masked token, 1/t."""
    return t, 1 / t


def cosine(t: FloatBL) -> tuple[FloatBL, FloatBL]:
    """MaskGIT's schedule (arXiv 2202.04200, section 3.3), with the bound's weight (MD4, arXiv 2406.04329, Table 1)."""
    angle = 0.5 * jnp.pi * (1 - t)
    return jnp.cos(angle), 0.5 * jnp.pi * jnp.tan(angle)


SCHEDULES = {"linear": linear, "cosine": cosine}


def mask_targets(batch: Batch, vocabulary: TokenIds, probability: FloatBL, keys: KeyB) -> IntBL:
    """Masks each target with its own probability; inputs and padding are unchanged.

    Args:
      batch: clean tokens.
      vocabulary: defines MASK.
      probability: of a mask, at every position.
      keys: a key for each row.
    """
    masked = jax.vmap(lambda key, row: jax.random.uniform(key, row.shape, jnp.float32) < row)(keys, probability)
    return jnp.where(masked & batch.target_mask, vocabulary.mask_id, batch.tokens)


Times = tuple[float, float]  # the part of [0, 1] that times are drawn from
ALL_TIMES: Times = (0.0, 1.0)


def check_times(times: Times) -> None:
    if not (isinstance(times, tuple | list) and len(times) == 2 and 0 <= times[0] <= times[1] <= 1 and times[1] > 0):
        raise UserError(
            f"Block.times must be (low, high) with 0 <= low <= high <= 1 and high > 0; got {times}. "
            "(0.0, 1.0) draws from all times."
        )


@dataclasses.dataclass(frozen=True)
class Masked(Objective):
    """Cross-entropy of masked targets given all other tokens.

    Each example, also each packed one, draws a time t in (epsilon, 1], stratified over the batch; t determines the
    probability with which each of its targets is masked. With the weights of the evidence bound, the expected loss
    divided by the number of targets is an upper bound on a token's negative log-likelihood; the schedule only changes
    its variance.

    Attributes:
      schedule: "linear": masked with probability t. "cosine": with probability cos(pi / 2 (1 - t)), which masks more.
      weighting: weight of a masked token. "elbo": the evidence bound's. "uniform": 1; with "cosine" this is MaskGIT.
      epsilon: minimum time, which bounds the weights.
      anneal_steps: training steps over which causal attention becomes bidirectional, see `annealed`; None: no
        annealing.
      normalize: denominator of the summed loss.
      softmax: what the loss is over, see `score`. "allowed": what decoders here may write. "all": MASK and spare rows
        as well, as in published training, so that programs that do not forbid them do not choose them either.
    """

    schedule: Schedule = "linear"
    weighting: Weighting = "elbo"
    epsilon: float = 1e-3
    anneal_steps: int | None = None
    normalize: Normalize = "target_tokens"
    softmax: LossSoftmax = "allowed"

    def __post_init__(self) -> None:
        check_choices(self)
        check_anneal_steps(self.anneal_steps)
        if not 0 <= self.epsilon < 1:
            raise UserError(f"Masked.epsilon must lie in [0, 1); got {self.epsilon}.")

    @property
    def attention(self) -> AttentionKind:
        return BIDIRECTIONAL

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (Mode.of(self.attention, "mask"),)

    @property
    def passes(self) -> Sequence[Pass]:
        return (Pass(),)

    def model_inputs(self, model: ModelDefinition, batch: Batch, key: KeyScalar) -> IntBL:
        batch, tokens, _ = self._corrupt(model.vocabulary, batch, key)
        return model_reads(tokens, batch, model)

    def _corrupt(self, vocabulary: TokenIds, batch: Batch, key: KeyScalar) -> tuple[Batch, IntBL, FloatBL]:
        """Returns the tokens to be predicted, for every position the token or MASK, and its weight if it is masked."""
        share = stratified(stream(key, "time"), batch.example_ids, batch.segment_ids)
        probability, weights = SCHEDULES[self.schedule](1 - (1 - self.epsilon) * share)
        keys = row_keys(stream(key, "where"), batch.example_ids)
        return batch, mask_targets(batch, vocabulary, probability, keys), weights

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar,
        train: bool = True,
        step: IntScalar | None = None,
        teacher: Transformer | None = None,
    ) -> LossSums:
        batch, tokens, weights, read = self._noisy(model, batch, key, train, step)
        output = read(tokens)
        nll, correct = score(model, output.hidden, batch.tokens, self.softmax)
        masked = batch.target_mask & (tokens == model.vocabulary.mask_id)
        return self._sums(batch, masked, weights, nll, correct, output.auxiliary)

    def _noisy(
        self, model: Transformer, batch: Batch, key: KeyScalar, train: bool, step: IntScalar | None
    ) -> tuple[Batch, IntBL, FloatBL, Callable[..., Output]]:
        """Returns what `_corrupt` does, without the tokens that have no room, and `(tokens, number=0) -> output`.

        The last runs a pass; passes of different numbers have different dropout.
        """
        dropout_keys = row_keys(stream(key, "dropout"), batch.example_ids) if train else None
        batch, tokens, weights = self._corrupt(model.vocabulary, batch, key)
        reading = Reading.of(batch, model.vocabulary, model.config.shifted, packed=True)
        batch = reading.fits(batch)
        encoded = model.encode(batch, dropout_keys)
        kind = annealed(self.attention, self.anneal_steps, step, key)

        def read(tokens: IntBL, number: int = 0) -> Output:
            keys = fold_in(dropout_keys, number) if dropout_keys is not None and number else dropout_keys
            return reading.output(model, tokens, kind, encoded, keys)

        return batch, tokens, weights, read

    def _sums(
        self, batch: Batch, masked: AnyBoolBL, weights: FloatBL, nll: FloatBL, correct: BoolBL, auxiliary: Auxiliaries
    ) -> LossSums:
        """Returns the loss and metrics of the masked targets."""
        nll = jnp.where(masked, nll, 0)
        loss = nll * weights if self.weighting == "elbo" else nll
        return LossSums(
            loss=normalized(batch, loss, self.normalize),
            metrics={
                "nll_bound": normalized(batch, nll * weights, "target_tokens"),
                "accuracy": Ratio(jnp.sum(masked & correct, dtype=jnp.float32), jnp.sum(masked, dtype=jnp.float32)),
                "mask_fraction": normalized(batch, masked, "target_tokens"),
            },
            auxiliary=auxiliary,
        )

    def log_likelihood(self, model: Transformer, batch: Batch, key: KeyScalar, num_draws: int) -> Likelihood:
        """Returns the evidence lower bound of all targets: the model also writes the canvas after the end of the text.

        It does not depend on `schedule`, `weighting`, `epsilon` or `softmax`.
        """
        encoded = model.encode(batch)
        reading = Reading.of(batch, model.vocabulary, model.config.shifted)

        def nll(tokens):
            return score(model, reading.output(model, tokens, self.attention, encoded).hidden, batch.tokens)[0]

        first_target = jnp.argmax(batch.target_mask, axis=-1, keepdims=True)
        return masked_bound(nll, model.vocabulary, batch, first_target, batch.target_mask, key, num_draws)
