"""Remasking (ReMDM, arXiv 2503.00307): ancestral sampling whose steps also mask written tokens again."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.absorbing import AbsorbingRule
from diffusion_t5x.decoding.canvas import Canvas, Written
from diffusion_t5x.decoding.commit import propose
from diffusion_t5x.errors import UserError, check_choices
from diffusion_t5x.models.sampling import uniform
from diffusion_t5x.models.streams import stream
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import BoolBL, FloatBLD, IntB1, IntBL, KeyB


@dataclasses.dataclass(frozen=True)
class RemaskingDecoder(AbsorbingRule):
    """Writes each masked target, and masks each written one again, with the probabilities of a schedule.

    Time runs from 1 to 0 in even steps. Of the targets, a share a is written before a step and b after it. A step masks
    a written target with a probability sigma of at most min(1, (1 - b) / a), and leaves a masked one masked with
    probability (1 - b - sigma a) / (1 - a) (equation 5), so that shares are the same for any sigma. A row takes all
    `num_steps` steps. The score is the log-probability that each token had in the step that wrote it last, averaged
    over targets. Higher is better.

    Attributes:
      num_steps: number of steps; the last one writes all that is masked.
      schedule: "capped": sigma is at most `eta` ("ReMDM-cap"). "rescaled": `eta` times its greatest value.
      eta: in [0, 1]; 0 is ancestral sampling.
      loop: (start, end, written), or None. The share of written targets rises to `written` until time `start`, stays
        there until `end`, and then rises to 1; only steps that begin in between mask anything ("ReMDM-loop"; the
        paper's are (0.55, 0.05, 0.9), with eta 0.02). None: the share rises evenly.
      by_confidence: sigma is divided over the written targets of a row, in proportion to exp(-p) with the probability p
        that a token had when it was written; masked targets are written as if sigma were 0 ("ReMDM-conf").
      temperature: sampling temperature; 0 takes the most likely token. Positions are random at any temperature.
      top_k, top_p: see `Sampling`.
    """

    keeps_written: ClassVar[bool] = False

    num_steps: int = 32
    schedule: Literal["capped", "rescaled"] = "capped"
    eta: float = 0.02
    loop: tuple[float, float, float] | None = None
    by_confidence: bool = False
    temperature: float = dataclasses.field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        if self.num_steps < 1 or not 0 <= self.eta <= 1:
            raise UserError(f"RemaskingDecoder needs num_steps of at least 1 and eta in [0, 1]; got {self}.")
        if self.loop is not None:
            start, end, written = self.loop if len(self.loop) == 3 else (0, 0, 0)
            if not (0 < end <= start < 1 and 0 < written < 1):
                raise UserError(
                    "RemaskingDecoder.loop must be (start, end, written) with 0 < end <= start < 1 and "
                    f"0 < written < 1; got {self.loop}."
                )

    def eligible(self, tokens: IntBL, target_mask: BoolBL, vocabulary: TokenIds, step: IntB1) -> BoolBL:
        """Returns all targets until the last step."""
        return target_mask & (step < self.num_steps)

    def most_steps(self, num_targets: int) -> int:
        return self.num_steps

    def chances(self) -> tuple[Float[np.ndarray, " steps"], Float[np.ndarray, " steps"]]:
        """Returns for each step the probability that a written target is masked, and that a masked one stays so."""
        passed = np.linspace(0, 1, self.num_steps + 1)
        if self.loop is None:
            written, in_loop = passed, np.ones(self.num_steps, bool)
        else:
            start, end, plateau = self.loop
            written = np.interp(passed, [0, 1 - start, 1 - end, 1], [0, plateau, plateau, 1])
            in_loop = (passed[:-1] >= 1 - start - 1e-9) & (passed[:-1] < 1 - end - 1e-9)
        before, after = written[:-1], written[1:]
        most = np.minimum(1, (1 - after) / np.maximum(before, 1e-12))
        sigma = in_loop * (np.minimum(self.eta, most) if self.schedule == "capped" else self.eta * most)
        return sigma, (1 - after - (0 if self.by_confidence else sigma) * before) / (1 - before)

    def write(
        self,
        model: Transformer,
        hidden: FloatBLD,
        canvas: Canvas,
        eligible: BoolBL,
        positions: IntBL,
        keys: KeyB,
    ) -> Written:
        """Takes one step: writes some of the masked targets, and masks some of the written ones."""

        def read_out(logits, positions):
            return propose(logits, keys, positions, model.vocabulary, self.sampling, "random")

        proposed, log_probability, _ = model.map_logits(read_out, hidden, positions)
        masked = eligible & (canvas.tokens == model.vocabulary.mask_id)
        sigma, stays = (jnp.asarray(x, jnp.float32)[canvas.step] for x in self.chances())
        if self.by_confidence:
            written = eligible & ~masked
            sigma = sigma * jax.nn.softmax(-jnp.exp(canvas.log_probability), axis=-1, where=written)
        drawn = uniform(stream(keys, "remasking"), positions)
        writes, takes_back = masked & (drawn >= stays), eligible & ~masked & (drawn < sigma)
        gained = jnp.where(writes, log_probability, 0) - jnp.where(takes_back, canvas.log_probability, 0)
        return Written(
            tokens=jnp.where(writes, proposed, jnp.where(takes_back, model.vocabulary.mask_id, canvas.tokens)),
            mask=writes | takes_back,
            log_probability=jnp.where(takes_back, -jnp.inf, log_probability),
            score=jnp.sum(gained, axis=-1),
        )
