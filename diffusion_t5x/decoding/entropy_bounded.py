"""Masked decoding by entropy: a step writes as many tokens as depend on each other little enough."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_t5x.decoding.absorbing import AbsorbingRule
from diffusion_t5x.decoding.canvas import Canvas, Written
from diffusion_t5x.decoding.commit import Order, Softmax, choose, propose
from diffusion_t5x.errors import UserError, check_choices
from diffusion_t5x.models.sampling import Sampling
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import BoolBL, FloatBL, FloatBLD, IntB, IntBL, KeyB


@dataclasses.dataclass(frozen=True)
class EntropyBoundedDecoder(AbsorbingRule):
    """Writes the largest set of tokens, most certain first, whose entropies sum to little (arXiv 2505.24857).

    Tokens of one step are drawn independently. What that gets wrong is at most the sum of their entropies less the
    largest one, in nats: that much is allowed per step. The score is that of `MaskedDecoder`.

    Attributes:
      bound: at most so many nats per step (the paper's gamma); 0 writes one token per step, unless others are certain.
      counts_largest: the largest entropy counts in the sum, too, as in OPDLM's code (github.com/divelab/OPDLM at
        3bb8bf6, where the bound is 0.35): fewer tokens per step.
      order: which positions come first: see `commit.propose`.
      softmax: of what entropy and certainty are: see `commit.propose`.
      guidance: see `StepRule`.
      temperature: of sampling; 0 takes the most likely token.
      top_k, top_p: see `Sampling`.
    """

    bound: float = 0.1
    counts_largest: bool = False
    order: Order = "entropy"
    softmax: Softmax = "allowed"
    guidance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        if not self.bound >= 0:
            raise UserError(f"EntropyBoundedDecoder.bound must be at least 0; got {self.bound}.")

    @property
    def samples_model(self) -> bool:
        """False for the order of confidence, as in `MaskedDecoder`."""
        return self.sampling == Sampling(1.0) and self.order != "confidence"

    def most_steps(self, num_targets: int) -> int:
        return num_targets

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

        def read_out(logits, positions):
            arguments = logits, keys, positions, model.vocabulary, self.sampling
            return *propose(*arguments, self.order, self.softmax), -propose(*arguments, "entropy", self.softmax)[2]

        tokens, log_probability, certainty, entropy = model.map_logits(read_out, hidden, positions)
        count = within_bound(certainty, entropy, eligible, self.bound, self.counts_largest)
        chosen = choose(certainty, eligible, count)
        return self.written(canvas, chosen, tokens, log_probability)


def within_bound(
    certainty: FloatBL, entropy: FloatBL, eligible: BoolBL, bound: float, counts_largest: bool = False
) -> IntB:
    """Returns how many eligible positions, most certain first, have a sum of entropies less the largest within a bound.

    Args:
      certainty: of every position.
      entropy: of every position, in nats.
      eligible: positions that count; a row with any gets at least 1.
      bound: in nats.
      counts_largest: of the sum itself.
    """
    order = jnp.lexsort((-certainty, ~eligible), axis=-1)
    entropy = jnp.take_along_axis(entropy, order, axis=-1)
    total = jnp.cumsum(entropy, axis=-1)
    excess = total if counts_largest else total - jax.lax.cummax(entropy, axis=1)
    fits = jnp.take_along_axis(eligible, order, axis=-1) & (excess <= bound)
    return jnp.maximum(jnp.sum(fits, axis=-1, dtype=jnp.int32), 1)
