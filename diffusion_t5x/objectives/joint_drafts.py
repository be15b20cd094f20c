"""An autoregressive loss plus one for drafts on the same parameters: one checkpoint drafts and checks in one pass."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import text_of
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.output import Ratio
from diffusion_t5x.models.reading import shift_right, shifted_slots
from diffusion_t5x.models.readout import cross_entropy
from diffusion_t5x.models.sampling import forbid, is_likeliest, likeliest
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.models.transformer import ModelDefinition, Transformer
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.blocks import block_starts
from diffusion_t5x.objectives.divergences import divergence
from diffusion_t5x.objectives.drafts import InDrafts, with_drafts, worth
from diffusion_t5x.objectives.objective import Likelihood, LossSums, Pass
from diffusion_t5x.shapes import IntBL, IntScalar, KeyScalar


@dataclasses.dataclass(frozen=True)
class JointDrafts(InDrafts):
    """Cross-entropy of each token given those before it, plus `draft_weight` * the divergence of drafts.

    One pass reads the clean text from left to right and, after it, a MASK for each token (the layout of TiDAR, arXiv
    2511.08923, fully masked). Targets are divided into blocks; a MASK sees what predicts the first token of its block,
    and the MASKs before it in the block, as in `DraftingDecoder`. In training, each row's blocks begin at a random
    place, because decoding drafts from any place.

    The target of a draft is the model's own distribution of that token given all text before it, without gradients:
    drafts are checked against it.

    Attributes:
      block_size: tokens per block: one that is certain and `block_size - 1` drafts.
      draft_weight: weight of a draft's loss; a token's autoregressive loss has weight 1.
    """

    draft_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draft_weight < 0:
            raise UserError(f"JointDrafts.draft_weight must not be negative; got {self.draft_weight}.")

    @property
    def passes(self) -> Sequence[Pass]:
        """One pass over twice the slots, and logits for all of them."""
        return (Pass(slots=2), Pass(slots=0, encodes=False))

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
        vocabulary, length = model.vocabulary, batch.tokens.shape[1]
        ahead, dropout_keys = jnp.zeros(len(batch.tokens), jnp.int32), None
        if train:
            dropout_keys = row_keys(stream(key, "dropout"), batch.example_ids)
            draw_keys = row_keys(stream(key, "blocks"), batch.example_ids)
            ahead = jax.vmap(lambda key: jax.random.randint(key, (), 0, self.block_size))(draw_keys)
        starts, text = block_starts(batch, self.block_size, ahead=ahead), text_of(batch, vocabulary)
        is_first = text & (starts == jnp.arange(length))
        drafted = text & ~is_first

        tokens = shift_right(batch.tokens, batch.positions, vocabulary.start_id)
        both = jnp.concatenate([tokens, jnp.full_like(tokens, vocabulary.mask_id)], axis=1)
        slots = with_drafts(shifted_slots(batch, vocabulary), drafted, starts)
        slots = slots.replace(index=jnp.tile(jnp.arange(length), 2)[None])
        output = model(both, slots, self.of_drafts, model.encode(batch, dropout_keys), dropout_keys)

        def read_out(drafts, clean, labels):
            clean, drafts = model.logits(clean), forbid(drafts, vocabulary)
            known = jax.lax.stop_gradient(forbid(clean, vocabulary))
            agree = is_likeliest(drafts, likeliest(known))
            return cross_entropy(clean, labels)[1], is_likeliest(clean, labels), divergence(known, drafts), agree

        clean, drafts = jnp.split(output.hidden, 2, axis=1)
        nll, correct, distance, agree = model.map_logits(read_out, drafts, clean, batch.tokens)
        count = jnp.sum(text, dtype=jnp.float32)
        ar, of_drafts = jnp.sum(jnp.where(text, nll, 0)), jnp.sum(jnp.where(drafted, distance, 0))
        return LossSums(
            loss=Ratio(ar + self.draft_weight * of_drafts, count),
            metrics={
                "nll": Ratio(ar, count),
                "accuracy": Ratio(jnp.sum(text & correct, dtype=jnp.float32), count),
                "divergence": Ratio(of_drafts, jnp.sum(drafted, dtype=jnp.float32)),
                **worth(agree, drafted, is_first, starts),
            },
            auxiliary=output.auxiliary,
        )

    def log_likelihood(self, model: Transformer, batch: Batch, key: KeyScalar, num_draws: int) -> Likelihood:
        """Exact: drafts are checked, so texts have the distribution of token-by-token decoding."""
        return Autoregressive().log_likelihood(model, batch, key, num_draws)
