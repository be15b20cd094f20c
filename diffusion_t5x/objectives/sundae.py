"""SUNDAE: a step-unrolled denoising autoencoder, as simplified for text diffusion by paper 1.

"Transfer Learning for Text Diffusion Models" (arXiv 2401.17181, section 3); SUNDAE is arXiv 2112.06749.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError, check_choices
from diffusion_t5x.models.layers import fold_in
from diffusion_t5x.models.masks import BIDIRECTIONAL, AttentionKind
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.output import Auxiliaries, Ratio, merged
from diffusion_t5x.models.reading import Reading, model_reads
from diffusion_t5x.models.readout import cross_entropy
from diffusion_t5x.models.sampling import Sampling, forbid, is_likeliest, likeliest, sample
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.models.transformer import ModelDefinition, Transformer
from diffusion_t5x.objectives.annealing import annealed, check_anneal_steps
from diffusion_t5x.objectives.objective import Likelihood, LossSums, Normalize, Objective, Pass, normalized
from diffusion_t5x.objectives.uniform_bound import uniform_bound
from diffusion_t5x.shapes import IntBL, IntScalar, KeyB, KeyScalar


def corrupt(batch: Batch, vocabulary: TokenIds, keys: KeyB) -> IntBL:
    """Replaces targets with uniform noise; each example has its own noise level.

    Each example, also each packed one, draws α ~ U[0, 1]; each of its targets is replaced with probability α by a token
    drawn uniformly from the noise vocabulary, which may be the same token. Inputs and padding are unchanged.

    Args:
      batch: clean tokens.
      vocabulary: defines the noise vocabulary.
      keys: a key for each row.
    """

    def row(key, segment_ids):
        levels = jax.random.uniform(stream(key, "level"), (segment_ids.size + 1,), jnp.float32)[segment_ids]
        replaced = jax.random.uniform(stream(key, "where"), segment_ids.shape, jnp.float32) < levels
        return replaced, vocabulary.sample_noise(stream(key, "noise"), segment_ids.shape)

    replaced, noise = jax.vmap(row)(keys, batch.segment_ids)
    return jnp.where(replaced & batch.target_mask, noise, batch.tokens)


@dataclasses.dataclass(frozen=True)
class Sundae(Objective):
    """Cross-entropy of the clean targets given noisy ones, then given the model's own output, and so on.

    Attributes:
      num_unrolls: number of times the model reads its own output: the loss has `num_unrolls + 1` terms.
      weights: weights of the terms; None means 1 for each.
      temperature: sampling temperature of the model's output for the next term; 0 takes the most likely token (paper
        1), 1 is SUNDAE's.
      anneal_steps: training steps over which causal attention becomes bidirectional, see `annealed`; None: no
        annealing.
      normalize: denominator of the summed loss.
    """

    num_unrolls: int = 1
    weights: tuple[float, ...] | None = None
    temperature: float = 0.0
    anneal_steps: int | None = None
    normalize: Normalize = "target_tokens"

    def __post_init__(self) -> None:
        check_choices(self)
        check_anneal_steps(self.anneal_steps)
        if self.num_unrolls < 0 or self.temperature < 0:
            raise UserError(f"num_unrolls and temperature must not be negative; got {self}.")
        if self.weights is not None and len(self.weights) != self.num_unrolls + 1:
            raise UserError(
                f"Sundae.weights needs {self.num_unrolls + 1} values, one for each term; got {self.weights}."
            )

    @property
    def attention(self) -> AttentionKind:
        return BIDIRECTIONAL

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (Mode.of(self.attention, "uniform"),)

    @property
    def passes(self) -> Sequence[Pass]:
        return (Pass(), *[Pass(encodes=False)] * self.num_unrolls)

    def model_inputs(self, model: ModelDefinition, batch: Batch, key: KeyScalar) -> IntBL:
        return model_reads(self._corrupt(model.vocabulary, batch, key), batch, model)

    def _corrupt(self, vocabulary: TokenIds, batch: Batch, key: KeyScalar) -> IntBL:
        return corrupt(batch, vocabulary, row_keys(stream(key, "noise"), batch.example_ids))

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar,
        train: bool = True,
        step: IntScalar | None = None,
        teacher: Transformer | None = None,
    ) -> LossSums:
        sample_keys, dropout_keys, encoder_keys = (
            row_keys(stream(key, name), batch.example_ids) for name in ("samples", "dropout", "encoder dropout")
        )
        tokens = self._corrupt(model.vocabulary, batch, key)
        reading = Reading.of(batch, model.vocabulary, model.config.shifted, packed=True)
        batch = reading.fits(batch)
        kind = annealed(self.attention, self.anneal_steps, step, key)
        changed = normalized(batch, tokens != batch.tokens, "target_tokens")
        metrics = {"noise_fraction": changed}
        terms: list[Ratio] = []
        auxiliary: Auxiliaries = {}
        encoded = model.encode(batch, encoder_keys if train else None)
        for unroll in range(self.num_unrolls + 1):
            term_keys = fold_in(dropout_keys, unroll) if train else None
            output = reading.output(model, tokens, kind, encoded, term_keys)
            auxiliary = merged(auxiliary, output.auxiliary)
            loss, predicted, repaired = self._read_out(model, output.hidden, batch, fold_in(sample_keys, unroll))
            terms.append(normalized(batch, loss, self.normalize))
            metrics[f"loss_{unroll + 1}"] = normalized(batch, loss, "target_tokens")
            metrics[f"accuracy_{unroll + 1}"] = normalized(batch, predicted, "target_tokens")
            # Targets carry the model's output, inputs their clean tokens. No gradient flows through integers.
            tokens = jnp.where(batch.target_mask, repaired, batch.tokens)
        weights = self.weights or (1.0,) * len(terms)
        total = sum(weight * term.numerator for weight, term in zip(weights, terms, strict=True))
        return LossSums(terms[0].replace(numerator=total), metrics, auxiliary)

    def log_likelihood(self, model: Transformer, batch: Batch, key: KeyScalar, num_draws: int) -> Likelihood:
        """Returns a lower bound of all targets: uniform-noise diffusion without unrolls, see `uniform_bound`."""
        encoded = model.encode(batch)
        reading = Reading.of(batch, model.vocabulary, model.config.shifted)
        first_target = jnp.argmax(batch.target_mask, axis=-1, keepdims=True)

        def hidden(tokens):
            return reading.output(model, tokens, self.attention, encoded).hidden

        return uniform_bound(model, hidden, batch, first_target, batch.target_mask, key, num_draws)

    def _read_out(self, model, hidden, batch, keys):
        """Returns per position the clean token's cross-entropy, True if it is the argmax, and a sample."""

        def score(logits, labels, positions):
            loss, _ = cross_entropy(logits, labels)
            logits = forbid(logits, model.vocabulary)  # the next term reads what a decoder could have written
            if self.temperature == 0:
                best = likeliest(logits).astype(labels.dtype)
                return loss, best == labels, best
            return loss, is_likeliest(logits, labels), sample(logits, keys, positions, Sampling(self.temperature))

        slots = jnp.broadcast_to(jnp.arange(hidden.shape[1]), batch.tokens.shape)
        return model.map_logits(score, hidden, batch.tokens, slots)
