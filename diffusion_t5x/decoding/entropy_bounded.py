"""Masked decoding by entropy: a step writes as many tokens as can be nearly independent."""

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
    """Writes the largest set of tokens, most certain first, within an entropy bound (arXiv 2505.24857).

    Tokens of one step are drawn independently. The error of that is at most the sum of their entropies minus the
    largest one, in nats, which `bound` limits per step. The score is that of `MaskedDecoder`.

    Attributes:
      bound: maximum number of nats per step (the paper's gamma); 0 writes one token per step, unless others are
        certain.
      counts_largest: include the largest entropy in the sum, as in OPDLM's code (github.com/divelab/OPDLM at
        3bb8bf6, where the bound is 0.35): fewer tokens per step.
      order: which positions come first: see `commit.propose`.
      softmax: distribution of entropy and certainty, see `commit.propose`.
      guidance: see `StepRule`.
      temperature: sampling temperature; 0 takes the most likely token.
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
        return self.sampling == Sampling(1.0) and self.order != "confidence" and not self.guidance

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
    """Returns how many eligible positions, most certain first, have entropies whose sum minus the largest is bounded.

    Args:
      certainty: of every position.
      entropy: of every position, in nats.
      eligible: positions that count; a row with any gets at least 1.
      bound: in nats.
      counts_largest: bound the sum including the largest.
    """
    order = jnp.lexsort((-certainty, ~eligible), axis=-1)
    entropy = jnp.take_along_axis(entropy, order, axis=-1)
    total = jnp.cumsum(entropy, axis=-1)
    excess = total if counts_largest else total - jax.lax.cummax(entropy, axis=1)
    fits = jnp.take_along_axis(eligible, order, axis=-1) & (excess <= bound)
    return jnp.maximum(jnp.sum(fits, axis=-1, dtype=jnp.int32), 1)
