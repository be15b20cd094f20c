"""Drafts: a frozen model learns to guess the tokens after its next one, which it then checks itself."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import text_of
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.attention import KVCache
from diffusion_t5x.models.masks import CAUSAL, AttentionKind, Slots
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.output import Ratio
from diffusion_t5x.models.reading import shift_right, shifted_slots
from diffusion_t5x.models.sampling import forbid, is_likeliest, likeliest
from diffusion_t5x.models.transformer import ModelDefinition, Transformer
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.blocks import block_starts
from diffusion_t5x.objectives.divergences import divergence
from diffusion_t5x.objectives.objective import Likelihood, LossSums, Objective, Pass
from diffusion_t5x.shapes import AnyBoolBL, BoolBL, FloatBLD, IntBL, IntScalar, KeyScalar


@dataclasses.dataclass(frozen=True)
class InDrafts(Objective):
    """An objective that also trains the tokens after the next one, each read from a MASK.

    Attributes:
      block_size: tokens per block: one that is certain and `block_size - 1` drafts.
    """

    autoregressive: ClassVar[bool] = True

    block_size: int = 4

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise UserError(
                f"{type(self).__name__}.block_size must be at least 2: a certain token and a draft; got "
                f"{self.block_size}."
            )

    @property
    def attention(self) -> AttentionKind:
        """The attention of the clean tokens; `modes` has the drafts'."""
        return CAUSAL

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (Mode.of(self.of_drafts, "mask"), Mode.of(CAUSAL))

    @property
    def of_drafts(self) -> AttentionKind:
        """The attention of drafts."""
        return AttentionKind("block_drafts", self.block_size)


@dataclasses.dataclass(frozen=True)
class Drafts(InDrafts):
    """KL divergence of the distribution drafted from MASK from the model's own left-to-right distribution.

    Targets are divided into blocks. The model predicts a block's first token from the text before it, and drafts the
    others at the same time, each from the same beginning, in a slot with MASK. The target is the model's own
    distribution of that token given all text before it, from one pass without gradients over the clean text, whose
    keys and values the drafts read.

    Only drafts are trained (`Lora.drafts_only`), so the model still writes the same text token by token. The layout
    is TiDAR's (arXiv 2511.08923), fully masked; the gate on the updates is that of arXiv 2507.11851.

    Attributes:
      block_size: tokens per block: one that is certain and `block_size - 1` drafts.
    """

    trains_drafts: ClassVar[bool] = True

    @property
    def passes(self) -> Sequence[Pass]:
        return (Pass(by_teacher=True), Pass())

    def model_inputs(self, model: ModelDefinition, batch: Batch, key: KeyScalar) -> IntBL:
        """Returns the clean tokens, read left to right; drafts read MASK."""
        return Autoregressive().model_inputs(model, batch, key)

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar,
        train: bool = True,
        step: IntScalar | None = None,
        teacher: Transformer | None = None,
    ) -> LossSums:
        """Deterministic and without dropout: the drafts must read what the decoder will read."""
        starts = block_starts(batch, self.block_size)
        text = text_of(batch, model.vocabulary)
        is_first = text & (starts == jnp.arange(batch.tokens.shape[1]))
        drafted = text & ~is_first
        clean, drafts = self._hidden(model, batch, drafted, starts)

        def compare(drafted, clean):
            target = jax.lax.stop_gradient(forbid(model.logits(clean), model.vocabulary))
            logits = forbid(drafted, model.vocabulary)
            agree = is_likeliest(logits, likeliest(target))
            return divergence(target, logits), agree

        distance, agree = model.map_logits(compare, drafts, clean)
        loss = Ratio(jnp.sum(jnp.where(drafted, distance, 0)), jnp.sum(drafted, dtype=jnp.float32))
        return LossSums(loss=loss, metrics=worth(agree, drafted, is_first, starts))

    def _hidden(self, model: Transformer, batch: Batch, drafted: AnyBoolBL, starts: IntBL) -> tuple[FloatBLD, FloatBLD]:
        """Returns the hidden states that predict tokens left to right, and those that draft them."""
        vocabulary, length = model.vocabulary, batch.tokens.shape[1]
        tokens = shift_right(batch.tokens, batch.positions, vocabulary.start_id)
        slots, encoded = shifted_slots(batch, vocabulary), model.encode(batch)
        at = jnp.zeros(len(batch.tokens), jnp.int32)
        cache = KVCache.empty(model.config, slots)
        clean, cache = jax.lax.stop_gradient(model.extend(tokens, CAUSAL, cache, at, encoded))

        both = with_drafts(slots, drafted, starts)
        keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, length), (0, 0), (0, 0))) for x in (cache.keys, cache.values))
        masks = jnp.full_like(tokens, vocabulary.mask_id)
        drafts, _ = model.extend(masks, self.of_drafts, KVCache(keys, values, both), at + length, encoded)
        return clean, drafts

    def log_likelihood(self, model: Transformer, batch: Batch, key: KeyScalar, num_draws: int) -> Likelihood:
        """Exact: drafts are checked, so texts have the distribution of token-by-token decoding."""
        return Autoregressive().log_likelihood(model, batch, key, num_draws)


def with_drafts(slots: Slots, drafted: AnyBoolBL, starts: IntBL) -> Slots:
    """Returns the slots of rows twice as long: the clean tokens, and behind them a draft of each token.

    Args:
      slots: of the clean tokens, read from left to right.
      drafted: the tokens that have a draft; the slots of the others are empty.
      starts: see `block_starts`. A draft sees what the first token of its block sees, and the drafts between.
    """
    ahead = jnp.arange(starts.shape[1]) - starts  # of the certain token, which a draft cannot see either
    of_drafts = slots.replace(
        segment_ids=jnp.where(drafted, slots.segment_ids, 0),
        is_input=jnp.zeros_like(drafted),
        seen=jnp.asarray(slots.positions) - ahead + 1,
    )
    slots = slots.replace(seen=jnp.full_like(starts, -1))
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), slots, of_drafts)


def worth(agree: BoolBL, drafted: AnyBoolBL, is_first: AnyBoolBL, starts: IntBL) -> dict[str, Ratio]:
    """Returns metrics of drafts: the share that agrees with the model, and the tokens that a pass would write.

    Args:
      agree: the drafts that are the model's most likely token.
      drafted: the tokens that have a draft.
      is_first: the first tokens of blocks.
      starts: see `block_starts`.
    """
    # A draft is of use if all before it in its block are right.
    wrong = jnp.cumsum(drafted & ~agree, axis=-1)
    accepted = drafted & (wrong == jnp.take_along_axis(wrong, jnp.clip(starts, 0), axis=-1))
    count, blocks = (jnp.sum(x, dtype=jnp.float32) for x in (drafted, is_first))
    return {
        "agreement": Ratio(jnp.sum(drafted & agree, dtype=jnp.float32), count),
        # If each block of the given text were decoded by itself.
        "tokens_per_pass": Ratio(blocks + jnp.sum(accepted, dtype=jnp.float32), blocks),
    }
