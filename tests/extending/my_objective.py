"""The conditional masked language model of Mask-Predict (arXiv 1904.09324)."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import check_choices
from diffusion_t5x.models.masks import BIDIRECTIONAL, AttentionKind, same_segment
from diffusion_t5x.models.reading import Reading, model_reads
from diffusion_t5x.models.readout import score
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.models.transformer import ModelDefinition, Transformer
from diffusion_t5x.objectives.likelihood import masked_bound
from diffusion_t5x.objectives.objective import (
    Likelihood,
    LossSums,
    Normalize,
    Objective,
    Pass,
    normalized,
    stratified,
)
from diffusion_t5x.shapes import IntBL, IntScalar, KeyScalar


@dataclasses.dataclass(frozen=True)
class MaskPredict(Objective):
    """Cross-entropy of n masked targets given the others, n uniform between one and all of an example's targets.

    Attributes:
      normalize: what the summed loss is divided by.
    """

    normalize: Normalize = "target_tokens"

    def __post_init__(self) -> None:
        check_choices(self)

    @property
    def attention(self) -> AttentionKind:
        return BIDIRECTIONAL

    @property
    def passes(self) -> Sequence[Pass]:
        return (Pass(),)

    def corrupt(self, vocabulary: TokenIds, batch: Batch, key: KeyScalar) -> IntBL:
        """The clean tokens with n targets of each example masked."""
        keys = row_keys(stream(key, "where"), batch.example_ids)
        order = jax.vmap(lambda key, row: jax.random.uniform(key, row.shape, jnp.float32))(keys, batch.positions)
        others = same_segment(batch.segment_ids, batch.segment_ids) & batch.target_mask[:, None]
        size = jnp.sum(others, axis=-1)
        rank = jnp.sum(others & (order[:, None] < order[:, :, None]), axis=-1)
        level = stratified(stream(key, "level"), batch.example_ids, batch.segment_ids)
        return jnp.where(batch.target_mask & (rank <= level * size), vocabulary.mask_id, batch.tokens)

    def model_inputs(self, model: ModelDefinition, batch: Batch, key: KeyScalar) -> IntBL:
        return model_reads(self.corrupt(model.vocabulary, batch, key), batch, model)

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar,
        train: bool = True,
        step: IntScalar | None = None,
        teacher: Transformer | None = None,
    ) -> LossSums:
        dropout_keys = row_keys(stream(key, "dropout"), batch.example_ids) if train else None
        tokens = self.corrupt(model.vocabulary, batch, key)
        reading = Reading.of(batch, model.vocabulary, model.config.shifted, packed=True)
        batch = reading.fits(batch)
        encoded = model.encode(batch, dropout_keys)
        output = reading.output(model, tokens, self.attention, encoded, dropout_keys)
        nll, correct = score(model, output.hidden, batch.tokens)
        masked = batch.replace(target_mask=batch.target_mask & (tokens == model.vocabulary.mask_id))
        return LossSums(
            loss=normalized(masked, nll, self.normalize),
            metrics={"accuracy": normalized(masked, correct, "target_tokens")},
            auxiliary=output.auxiliary,
        )

    def log_likelihood(self, model: Transformer, batch: Batch, key: KeyScalar, num_draws: int) -> Likelihood:
        """The lower bound of masked diffusion."""
        encoded = model.encode(batch)
        reading = Reading.of(batch, model.vocabulary, model.config.shifted)

        def nll(tokens):
            return score(model, reading.output(model, tokens, self.attention, encoded).hidden, batch.tokens)[0]

        first_target = jnp.argmax(batch.target_mask, axis=-1, keepdims=True)
        return masked_bound(nll, model.vocabulary, batch, first_target, batch.target_mask, key, num_draws)
