"""Supervised fine-tuning of a block-diffusion model as in OPDLM's baseline (arXiv 2606.06712).

The released code is github.com/divelab/OPDLM at 3bb8bf6, train/rl_sdar.py, `forward_process_nll`.
"""

import dataclasses

import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import text_of
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.output import Ratio
from diffusion_t5x.models.readout import score
from diffusion_t5x.models.streams import row_keys, stream
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.objectives.block import InBlocks
from diffusion_t5x.objectives.masked import mask_targets
from diffusion_t5x.objectives.objective import LossSums, Normalize
from diffusion_t5x.objectives.texts import over_texts, random_states, scored_tokens
from diffusion_t5x.shapes import IntBL, IntScalar, KeyScalar


@dataclasses.dataclass(frozen=True)
class BlockSft(InBlocks):
    """Cross-entropy of the masked tokens of a text, without weights: its mean over a text, then over texts.

    Unlike `Block`, it is not a bound on the likelihood: every masked token counts the same, however many are masked,
    and neither padding nor, by default, the token that ends the text is learned.

    Attributes:
      block_size: number of targets per block.
      mask_probability: of each target, independently. 1/2 in the released code, which compares a uniform number with
        another from [0.1, 0.9], both drawn anew for each token. None: as in `texts.random_states`.
      score_end: include the token that ends a text. The released code leaves it out.
      normalize: "sequences" as in the released code; see `texts.over_texts`.
      blocks_from: where blocks are counted from, see `AttentionKind`.
      softmax: what the loss is over, see `Masked`.
    """

    mask_probability: float | None = 0.5
    score_end: bool = False
    normalize: Normalize = "sequences"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_probability is not None and not 0 < self.mask_probability <= 1:
            raise UserError(f"BlockSft.mask_probability must lie in (0, 1], or be None; got {self.mask_probability}.")

    def noisy(self, vocabulary: TokenIds, batch: Batch, key: KeyScalar) -> IntBL:
        if self.mask_probability is None:
            return random_states(batch, vocabulary, self.block_size, key, self.blocks_from)
        probability = jnp.full(batch.tokens.shape, self.mask_probability, jnp.float32)
        return mask_targets(batch, vocabulary, probability, row_keys(stream(key, "where"), batch.example_ids))

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
        nll, correct = score(model, output.hidden, batch.tokens, self.softmax)
        scored = scored_tokens(batch, vocabulary, noisy, self.score_end)
        return LossSums(
            loss=over_texts(batch, scored, nll, self.normalize),
            metrics={
                "nll": over_texts(batch, scored, nll, "target_tokens"),
                "accuracy": over_texts(batch, scored, correct, "target_tokens"),
                "mask_fraction": Ratio(*(jnp.sum(x, dtype=jnp.float32) for x in (scored, text_of(batch, vocabulary)))),
            },
            auxiliary=output.auxiliary,
        )
