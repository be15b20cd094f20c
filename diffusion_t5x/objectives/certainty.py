"""Certainty distillation: a block-diffusion model learns to be sure, sooner, of the texts that it writes anyway."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.readout import cross_entropy
from diffusion_t5x.models.sampling import forbid, is_likeliest
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.objectives.block import InBlocks
from diffusion_t5x.objectives.divergences import entropy
from diffusion_t5x.objectives.objective import LossSums, Normalize
from diffusion_t5x.objectives.texts import over_texts, random_states, scored_tokens
from diffusion_t5x.shapes import IntBL, IntScalar, KeyScalar


@dataclasses.dataclass(frozen=True)
class Certainty(InBlocks):
    """Cross-entropy of the masked tokens of the model's own texts, plus the entropy of those that it predicts.

    The text is what the model writes with few tokens per step (a rollout); the loss asks for the same text with many of
    them masked at once. The entropy, over `temperature`, counts only where the likeliest token is the text's: it makes
    right predictions surer, so that a threshold writes more of them in one step (dParallel, arXiv 2509.26488). Without
    a rollout the text is the data's.

    Weight and temperature are those of the released code (github.com/czg1225/dParallel at 57e1e68, LLaDA/llada_train.py).
    It masks half of one block per text, and the rest in a second copy; here all blocks are masked, each by another
    share. There the entropy's mean is over right predictions, here over masked tokens, as the cross-entropy's.

    Attributes:
      block_size: number of targets per block.
      certainty_weight: weight of the entropy.
      temperature: of the distribution whose entropy is taken; below 1 it counts most where two tokens compete.
      normalize: denominator of the summed loss.
    """

    takes_rollouts: ClassVar[bool] = True

    certainty_weight: float = 2.0
    temperature: float = 0.5
    normalize: Normalize = "target_tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.certainty_weight < 0:
            raise UserError(f"Certainty.certainty_weight must not be negative; got {self.certainty_weight}.")
        if self.temperature <= 0:
            raise UserError(f"Certainty.temperature must be above 0; got {self.temperature}.")

    def noisy(self, vocabulary: TokenIds, batch: Batch, key: KeyScalar) -> IntBL:
        return random_states(batch, vocabulary, self.block_size, stream(key, "noise"), self.blocks_from)

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar,
        train: bool = True,
        step: IntScalar | None = None,
        teacher: Transformer | None = None,
    ) -> LossSums:
        vocabulary = model.vocabulary
        dropout_keys = row_keys(stream(key, "dropout"), batch.example_ids) if train else None
        noisy = self.noisy(vocabulary, batch, key)
        batch, output, _ = self.output(model, batch, noisy, dropout_keys)

        def read_out(logits, labels):
            allowed = forbid(logits, vocabulary)
            _, nll = cross_entropy(allowed if self.softmax == "allowed" else logits, labels)
            return nll, is_likeliest(allowed, labels), entropy(allowed / self.temperature)

        nll, correct, spread = model.map_logits(read_out, output.hidden, batch.tokens)
        scored = scored_tokens(batch, vocabulary, noisy, score_end=True)
        nll = jnp.where(scored, nll, 0)  # what is not scored may be MASK, which is never predicted
        loss = nll + self.certainty_weight * jnp.where(scored & correct, spread, 0)

        def mean(values, where):
            return over_texts(batch, where, values, "target_tokens")

        return LossSums(
            loss=over_texts(batch, scored, loss, self.normalize),
            metrics={
                "nll": mean(nll, scored),
                "accuracy": mean(correct, scored),
                "entropy": mean(spread, scored & correct),
            },
            auxiliary=output.auxiliary,
        )
