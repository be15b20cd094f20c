"""Masked decoding with credit: a token that stays the most likely one is written sooner."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from diffusion_t5x.decoding.absorbing import AbsorbingRule
from diffusion_t5x.decoding.canvas import Canvas, Written
from diffusion_t5x.decoding.commit import Softmax, choose, propose
from diffusion_t5x.errors import UserError, check_choices
from diffusion_t5x.models.readout import cross_entropy
from diffusion_t5x.models.sampling import forbid, likeliest
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import BoolBL, FloatBLD, IntBL, KeyB


@dataclasses.dataclass(frozen=True)
class CreditDecoder(AbsorbingRule):
    """Writes every token whose probability exceeds a threshold once its credit is added (CreditDecoding, 2510.06133).

    At each step, the credit of all ids in a masked slot shrinks by `beta`, and the most likely id gains its probability
    to the power `gamma`. Tokens and confidences are those of the logits plus `alpha` log(1 + credit). The score is that
    of `MaskedDecoder`, of the model's own probabilities.

    Credit is a float32 for every id in every slot: use it in windows or blocks if the vocabulary is large.

    Attributes:
      threshold: a step writes every token whose probability exceeds it, at least one.
      alpha: weight of credit in the logits; 0 is `MaskedDecoder` with a threshold.
      beta: in [0, 1], share of credit that is left after a step.
      gamma: exponent of the probability that is gained.
      softmax: distribution of these probabilities, see `commit.propose`.
      guidance: see `StepRule`.
      temperature: sampling temperature; 0 takes the most likely token.
      top_k, top_p: see `Sampling`.
    """

    threshold: float = 0.9
    alpha: float = 0.7
    beta: float = 0.8
    gamma: float = 0.2
    softmax: Softmax = "allowed"
    guidance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        if not (0 <= self.threshold <= 1 and 0 <= self.beta <= 1 and self.alpha >= 0 and self.gamma >= 0):
            raise UserError(
                f"CreditDecoder needs threshold and beta in [0, 1], alpha and gamma of at least 0; got {self}."
            )

    def most_steps(self, num_targets: int) -> int:
        return num_targets

    def start_memory(self, model: Transformer, tokens: IntBL) -> Float[jax.Array, "batch length vocab"]:
        """Returns the credit of every id in every slot."""
        return jnp.zeros((*tokens.shape, model.config.num_embeddings), jnp.float32)

    def write(
        self,
        model: Transformer,
        hidden: FloatBLD,
        canvas: Canvas,
        eligible: BoolBL,
        positions: IntBL,
        keys: KeyB,
    ) -> Written:
        """Takes one step: writes at least one eligible position of each row that has any."""

        def read_out(logits, positions, credit, eligible):
            allowed = forbid(logits, model.vocabulary)
            judged = logits if self.softmax == "all" else allowed
            first = jax.nn.one_hot(likeliest(judged), logits.shape[-1])
            gained = first * jnp.max(jax.nn.softmax(judged), axis=-1, keepdims=True) ** self.gamma
            credit = self.beta * credit + jnp.where(eligible[..., None], gained, 0)
            raised = logits + self.alpha * jnp.log1p(credit)
            tokens, _, certainty = propose(
                raised, keys, positions, model.vocabulary, self.sampling, "confidence", self.softmax
            )
            return tokens, -cross_entropy(allowed, tokens)[1], certainty, credit

        tokens, log_probability, certainty, credit = model.map_logits(
            read_out, hidden, positions, canvas.memory, eligible
        )
        chosen = choose(certainty, eligible, jnp.ones(len(eligible), jnp.int32), self.threshold)
        return self.written(canvas, chosen, tokens, log_probability).replace(memory=credit)
