"""A diffusion loss plus an autoregressive loss on the same parameters, so that one checkpoint decodes either way.

Like TiDAR (arXiv 2511.08923), but in two passes: the diffusion objective's own, and a causal one.
"""

import dataclasses
from collections.abc import Sequence

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.ends import text_of
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.masks import AttentionKind
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.output import Ratio, merged
from diffusion_t5x.models.streams import stream
from diffusion_t5x.models.transformer import ModelDefinition, Transformer
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.objective import Likelihood, LossSums, Normalize, Objective, Pass
from diffusion_t5x.shapes import IntBL, IntScalar, KeyScalar


@dataclasses.dataclass(frozen=True)
class Joint(Objective):
    """`diffusion` + `ar_weight` * autoregressive: one loss, two passes over the same batch.

    The autoregressive loss covers only the text, up to the token that ends it, and has the diffusion loss's
    denominator, so each token has weight `ar_weight`. Its metrics begin with "ar_".

    Attributes:
      diffusion: the diffusion objective, which also defines attention and likelihood; the other pass is
        `Autoregressive`'s.
      ar_weight: weight of the autoregressive loss.
    """

    diffusion: Objective
    ar_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.diffusion.autoregressive or self.diffusion.needs_teacher:
            raise UserError(f"Joint.diffusion must be a diffusion objective without a teacher; got {self.diffusion}.")
        if self.ar_weight < 0:
            raise UserError(f"Joint.ar_weight must not be negative; got {self.ar_weight}.")

    @property
    def normalize(self) -> Normalize:
        return self.diffusion.normalize

    @property
    def attention(self) -> AttentionKind:
        return self.diffusion.attention

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (*self.diffusion.modes, *Autoregressive().modes) if self.diffusion.modes else ()

    @property
    def passes(self) -> Sequence[Pass]:
        return (*self.diffusion.passes, *Autoregressive().passes)

    def model_inputs(self, model: ModelDefinition, batch: Batch, key: KeyScalar) -> IntBL:
        return self.diffusion.model_inputs(model, batch, key)

    def loss(
        self,
        model: Transformer,
        batch: Batch,
        key: KeyScalar,
        train: bool = True,
        step: IntScalar | None = None,
        teacher: Transformer | None = None,
    ) -> LossSums:
        diffusion = self.diffusion.loss(model, batch, key, train, step)
        text = batch.replace(target_mask=text_of(batch, model.vocabulary))
        ar = Autoregressive(normalize=self.normalize)
        causal = ar.loss(model, text, stream(key, "autoregressive"), train)
        numerator = diffusion.loss.numerator + self.ar_weight * causal.loss.numerator
        return LossSums(
            loss=Ratio(numerator, diffusion.loss.denominator),
            metrics={
                **diffusion.metrics,
                "diffusion_loss": diffusion.loss,
                **{f"ar_{name}": ratio for name, ratio in causal.metrics.items()},
            },
            auxiliary=merged(diffusion.auxiliary, causal.auxiliary),
        )

    def log_likelihood(self, model: Transformer, batch: Batch, key: KeyScalar, num_draws: int) -> Likelihood:
        """Returns the likelihood of decoding by diffusion; that of token-by-token decoding is `Autoregressive`'s."""
        return self.diffusion.log_likelihood(model, batch, key, num_draws)
