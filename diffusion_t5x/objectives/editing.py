"""Masked diffusion that also learns to replace wrong tokens: random ones, and those of its own drafts.

Token editing (LLaDA2.1, arXiv 2602.08676); the drafts are one unroll as in SUNDAE (arXiv 2112.06749).
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.output import Ratio, merged
from diffusion_t5x.models.readout import score, score_logits
from diffusion_t5x.models.sampling import Sampling, forbid, sample
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.objective import LossSums, Pass, normalized
from diffusion_t5x.shapes import AnyBoolBL, BoolBL, FloatBL, FloatBLD, IntBL, IntScalar, KeyB, KeyScalar


@dataclasses.dataclass(frozen=True)
class Editing(Masked):
    """Cross-entropy of masked targets and of visible ones, some of which are wrong.

    The first pass reads targets as `Masked` does, except that each visible one is replaced with the probability
    `random_share` by a token drawn uniformly from the noise vocabulary, which may be the same token. Its loss is that
    of `Masked`, plus the cross-entropy of visible targets, each of weight 1. The second pass reads what the model
    makes of that: each masked target is replaced by the model's own token. Its loss is the cross-entropy of all
    targets, times `draft_weight`. No gradient flows from the second pass into the first.

    With both settings 0 it is `Masked`. The likelihood is always that of `Masked`: of models that see no wrong tokens.

    Attributes:
      random_share: in [0, 1). 0: no random tokens, and no loss of visible targets in the first pass.
      draft_weight: weight of the second pass; 0: none.
      draft_temperature: sampling temperature of the model's tokens; 0 takes the most likely one.
    """

    random_share: float = 0.1
    draft_weight: float = 1.0
    draft_temperature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        Sampling(self.draft_temperature)  # raises on a bad temperature
        if not 0 <= self.random_share < 1:
            raise UserError(f"Editing.random_share must lie in [0, 1); got {self.random_share}.")
        if self.draft_weight < 0:
            raise UserError(f"Editing.draft_weight must not be negative; got {self.draft_weight}.")

    @property
    def passes(self) -> Sequence[Pass]:
        return (Pass(), Pass(encodes=False)) if self.draft_weight else (Pass(),)

    def _corrupt(self, vocabulary: TokenIds, batch: Batch, key: KeyScalar) -> tuple[Batch, IntBL, FloatBL]:
        batch, tokens, weights = super()._corrupt(vocabulary, batch, key)
        if not self.random_share:
            return batch, tokens, weights

        def row(key, tokens):
            replaced = jax.random.uniform(stream(key, "where"), tokens.shape, jnp.float32) < self.random_share
            return replaced, vocabulary.sample_noise(stream(key, "noise"), tokens.shape)

        replaced, noise = jax.vmap(row)(row_keys(stream(key, "errors"), batch.example_ids), tokens)
        visible = batch.target_mask & (tokens != vocabulary.mask_id)
        return batch, jnp.where(replaced & visible, noise, tokens), weights

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
        draft_keys = row_keys(stream(key, "drafts"), batch.example_ids)
        nll, correct, drafts = self._read_out(model, output.hidden, batch, draft_keys)
        masked = batch.target_mask & (tokens == model.vocabulary.mask_id)
        sums = self._sums(batch, masked, weights, nll, correct, output.auxiliary)
        if self.random_share:
            visible = batch.target_mask & ~masked
            sums = self._plus(sums, batch, jnp.where(visible, nll, 0), "random")
            del sums.metrics["nll_bound"]  # no bound: the model has seen wrong tokens
            sums.metrics.update(_edits(batch, tokens, visible, correct, "random"))
        if self.draft_weight:
            tokens = jnp.where(masked, drafts, tokens)
            again = read(tokens, 1)
            nll, correct = score(model, again.hidden, batch.tokens, self.softmax)
            sums = self._plus(sums, batch, self.draft_weight * nll, "draft")
            sums.metrics.update(_edits(batch, tokens, batch.target_mask, correct, "draft"))
            sums = sums.replace(auxiliary=merged(sums.auxiliary, again.auxiliary))
        return sums

    def _read_out(
        self, model: Transformer, hidden: FloatBLD, batch: Batch, keys: KeyB
    ) -> tuple[FloatBL, BoolBL, IntBL]:
        """Returns per position the clean token's cross-entropy, True if it is the most likely one, and a draft."""

        def read_out(logits, labels, positions):
            nll, correct = score_logits(logits, labels, model.vocabulary, self.softmax)
            if not self.draft_weight:
                return nll, correct, labels
            draft = sample(forbid(logits, model.vocabulary), keys, positions, Sampling(self.draft_temperature))
            return nll, correct, draft

        slots = jnp.broadcast_to(jnp.arange(hidden.shape[1]), batch.tokens.shape)
        return model.map_logits(read_out, hidden, batch.tokens, slots)

    def _plus(self, sums: LossSums, batch: Batch, loss: FloatBL, name: str) -> LossSums:
        """Adds a loss of targets, which is also logged by this name."""
        more = normalized(batch, loss, self.normalize)
        metrics = {**sums.metrics, f"{name}_loss": normalized(batch, loss, "target_tokens")}
        return sums.replace(loss=Ratio(sums.loss.numerator + more.numerator, sums.loss.denominator), metrics=metrics)


def _edits(batch: Batch, read: IntBL, visible: AnyBoolBL, correct: BoolBL, name: str) -> dict[str, Ratio]:
    """Returns metrics of visible targets: the shares of wrong ones mended, of right ones kept, and of wrong ones."""
    wrong = visible & (read != batch.tokens)
    right = visible & ~wrong

    def share(part, whole):
        return Ratio(jnp.sum(part & whole, dtype=jnp.float32), jnp.sum(whole, dtype=jnp.float32))

    return {
        f"{name}_mended": share(correct, wrong),
        f"{name}_kept": share(correct, right),
        f"{name}_wrong": share(wrong, visible),
    }
