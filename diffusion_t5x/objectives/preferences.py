"""Direct preference optimization: DPO (arXiv 2305.18290), and for diffusion VRPO (LLaDA 1.5, arXiv 2505.19223).

A row holds a pair: the inputs with the chosen text in its first half, the inputs with the rejected text in its second
half (`data.pair_source`). The reference is the run's initial checkpoint.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import text_of
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import AttentionKind
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.output import Ratio
from diffusion_t5x.models.streams import stream
from diffusion_t5x.models.transformer import ModelDefinition, Transformer
from diffusion_t5x.objectives.likelihood import check_num_draws
from diffusion_t5x.objectives.objective import Likelihood, LossSums, Normalize, Objective, Pass, no_teacher
from diffusion_t5x.shapes import IntBL, IntScalar, KeyScalar


def texts_of_pairs(pairs: Batch) -> Batch:
    """Returns the texts of pairs in rows of their own, `[2 * batch, length / 2]`: each chosen one before the rejected.

    Both have the pair's id, and so the same random numbers.
    """

    def split(x):
        return x.reshape(-1, x.shape[-1] // 2)

    return Batch(
        tokens=split(pairs.tokens),
        target_mask=split(pairs.target_mask),
        segment_ids=jnp.minimum(split(pairs.segment_ids), 1),
        positions=split(pairs.positions),
        example_ids=jnp.repeat(pairs.example_ids, 2),
    )


@dataclasses.dataclass(frozen=True)
class Preferences(Objective):
    """The chosen text becomes likelier than the rejected one, compared with the reference; without dropout.

    With m the gain of a text's log-likelihood over the reference's, the loss of a pair is
    -log sigmoid(beta (m(chosen) - m(rejected))): log 2 before the first update, and for equal texts always.

    The likelihood is that of another objective. An autoregressive one is exact, which is DPO. Those of diffusion are
    lower bounds, estimated from draws, which is VRPO: model and reference read the same noise (its antithetic
    sampling), and each draw has a time of its own (its optimal allocation), here from equal parts of [0, 1]. Here the
    two texts of a pair share the noise as well: what they have in common then cancels out.

    The model's own losses (`Output.auxiliary`) are not added.

    Attributes:
      likelihood: the objective that defines the log-likelihood, attention and modes.
      beta: strength of the hold on the reference, per nat; larger values stay closer to it.
      num_draws: number of draws for each text, an even number: as many passes of the model, and of the reference. Exact
        likelihoods take one.
      nll_weight: weight of the chosen text's negative log-likelihood per token, which is added to the loss (RPO, arXiv
        2404.19733). Without it, both texts may become less likely, the rejected one more so.
    """

    reads_pairs: ClassVar[bool] = True

    likelihood: Objective
    beta: float = 0.1
    num_draws: int = 2
    nll_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.likelihood.needs_teacher or self.likelihood.needs_rollouts:
            raise UserError(
                "Preferences.likelihood must be an objective without a teacher or rollouts, such as Block, Masked or "
                f"Autoregressive; got {self.likelihood}."
            )
        if not self.beta > 0 or self.nll_weight < 0:
            raise UserError(
                f"Preferences.beta must be above 0 and nll_weight at least 0; got {self.beta} and {self.nll_weight}."
            )
        check_num_draws(self.num_draws)

    @property
    def autoregressive(self) -> bool:  # type: ignore[override]
        return self.likelihood.autoregressive

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def taught_by_start(self) -> bool:
        return True

    @property
    def normalize(self) -> Normalize:
        return "sequences"

    @property
    def attention(self) -> AttentionKind:
        return self.likelihood.attention

    @property
    def modes(self) -> tuple[Mode, ...]:
        return self.likelihood.modes

    @property
    def passes(self) -> Sequence[Pass]:
        num_draws = 1 if self.autoregressive else self.num_draws
        by_model = self.likelihood.passes
        return (*by_model, *(dataclasses.replace(each, by_teacher=True) for each in by_model)) * num_draws

    def model_inputs(self, model: ModelDefinition, batch: Batch, key: KeyScalar) -> IntBL:
        """Returns what the inner objective's own loss reads of both texts; a bound's draws have masks of their own."""
        return self.likelihood.model_inputs(model, texts_of_pairs(batch), key).reshape(batch.tokens.shape)

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar,
        train: bool = True,
        step: IntScalar | None = None,
        teacher: Transformer | None = None,
    ) -> LossSums:
        if teacher is None:
            raise no_teacher(self)
        texts = texts_of_pairs(batch)
        found = self._log_likelihoods(model, texts, key)
        gain = found - jax.lax.stop_gradient(self._log_likelihoods(teacher, texts, key))
        margin = self.beta * (gain[:, 0] - gain[:, 1])
        is_pair = jnp.any(batch.target_mask, axis=-1)
        num_tokens = jnp.sum(text_of(texts, model.vocabulary), axis=-1).reshape(-1, 2)[:, 0]
        nll = -found[:, 0] / jnp.maximum(num_tokens, 1)
        loss = self.nll_weight * nll - jax.nn.log_sigmoid(margin)

        def over_pairs(x):
            return Ratio(*(jnp.sum(where, dtype=jnp.float32) for where in (jnp.where(is_pair, x, 0), is_pair)))

        return LossSums(
            loss=over_pairs(loss),
            metrics={
                "accuracy": over_pairs(margin > 0),
                "margin": over_pairs(margin),
                "chosen_gain": over_pairs(gain[:, 0]),
                "rejected_gain": over_pairs(gain[:, 1]),
                "chosen_nll": over_pairs(nll),
            },
        )

    def log_likelihood(self, model: Transformer, batch: Batch, key: KeyScalar, num_draws: int) -> Likelihood:
        """Returns the inner objective's log-likelihood of rows with one text each."""
        return self.likelihood.log_likelihood(model, batch, key, num_draws)

    def _log_likelihoods(self, model: Transformer, texts: Batch, key: KeyScalar) -> Float[jax.Array, "batch 2"]:
        """Returns the log-likelihoods of chosen and rejected texts, in nats; the same key draws the same noise."""
        found = self.likelihood.log_likelihood(model, texts, stream(key, "likelihood"), self.num_draws)
        return found.log_likelihood.reshape(-1, 2)
