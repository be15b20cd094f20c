"""SUNDAE decoding: denoise whole canvases of random tokens, many at once, and keep the best."""

import dataclasses
from typing import Literal, Self

import jax
import jax.numpy as jnp

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.allowed_texts import Choices, choose_text
from diffusion_t5x.decoding.canvas import Canvas, StepRule, Written
from diffusion_t5x.decoding.commit import choose
from diffusion_t5x.decoding.decoder import Decoded
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.decoding.rows import Carry
from diffusion_t5x.errors import UserError, check_choices
from diffusion_t5x.models.masks import BIDIRECTIONAL
from diffusion_t5x.models.modes import Mode
from diffusion_t5x.models.readout import cross_entropy
from diffusion_t5x.models.sampling import Sampling, forbid, sample, uniform
from diffusion_t5x.models.streams import stream
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import BoolBL, FloatBLD, IntB1, IntBL, KeyB


@dataclasses.dataclass(frozen=True)
class SundaeDecoder(StepRule):
    """Denoises `num_samples` canvases of uniform noise for `num_steps` steps and keeps each example's best.

    The score is the cross-entropy, in nats per target, between the canvas that the last step reads and its logits: how
    much the model would still change ("model score", arXiv 2401.17181 section 3). Lower is better; it is not a
    log-probability.

    The defaults are paper 1's. The rest is SUNDAE's own (arXiv 2112.06749, its section on sampling).

    Attributes:
      num_steps: maximum number of steps. A step is one forward pass; unrolls count as steps.
      num_samples: number of canvases per example.
      temperature: sampling temperature of every step; 0 takes the most likely token.
      method: "sample": every step writes `update_share` of the targets, chosen at random. "argmax_unrolled": steps take
        turns. One writes the most likely token at all targets; the next, the unroll, reads that and writes anew, with
        its own most likely tokens, only the `update_share` of them that the one before was least sure of. Nothing is
        sampled, so the temperature must be 0.
      update_share: in (0, 1], share of each row's targets that a step writes; rounded, at least one. A target that no
        step chose stays noise.
      stop_when_unchanged: a canvas is finished after a step that would have changed nothing had it written all targets,
        and its score is of that step; decoding stops when all are. At temperature 0 the result is the same, in less
        steps.
      language: what it may write, by `within`. Each step writes the best text of the language, or at a temperature
        above 0 draws one (see `allowed_texts`).
    """

    num_steps: int = 10
    num_samples: int = 8
    temperature: float = 0.2
    method: Literal["sample", "argmax_unrolled"] = "sample"
    update_share: float = 1.0
    stop_when_unchanged: bool = False
    language: Language | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.num_samples < 1:
            raise UserError(f"SundaeDecoder needs num_steps and num_samples of at least 1; got {self}.")
        Sampling(self.temperature)  # raises on bad values now, not in the middle of a run
        if not 0 < self.update_share <= 1:
            raise UserError(f"SundaeDecoder.update_share must lie in (0, 1]; got {self.update_share}.")
        check_choices(self)
        if self.method == "argmax_unrolled" and self.temperature:
            raise UserError(
                f"SundaeDecoder.method 'argmax_unrolled' takes the most likely tokens: it needs temperature = 0, not "
                f"{self.temperature}."
            )

    @property
    def modes(self) -> tuple[Mode, ...]:
        return (Mode.of(BIDIRECTIONAL, "uniform"),)

    @property
    def samples_model(self) -> bool:
        """True if each step draws all targets of its one canvas, and every row takes all steps."""
        free = self.temperature == 1 and self.language is None and not self.stop_when_unchanged
        return free and self.update_share == 1 and self.num_samples == 1 and self.guidance == 0

    def within(self, language: Language) -> Self:
        if self.update_share != 1:
            raise UserError(
                "With --regex or --json_schema, SundaeDecoder needs update_share = 1: what a step leaves is no part of "
                f"a text of the language; got {self}."
            )
        return dataclasses.replace(self, language=language)

    def blank(self, batch: Batch, vocabulary: TokenIds, keys: KeyB) -> IntBL:
        """Returns the rows with noise for targets."""
        noise = jax.vmap(vocabulary.sample_noise, (0, None))(stream(keys, "blank"), batch.tokens.shape[1:])
        return jnp.where(batch.target_mask, noise, batch.tokens)

    def eligible(self, tokens: IntBL, target_mask: BoolBL, vocabulary: TokenIds, step: IntB1) -> BoolBL:
        return target_mask & (step < self.num_steps)

    def most_steps(self, num_targets: int) -> int:
        return self.num_steps

    def write(
        self,
        model: Transformer,
        hidden: FloatBLD,
        canvas: Canvas,
        eligible: BoolBL,
        positions: IntBL,
        keys: KeyB,
    ) -> Written:
        """Takes one step. The score is minus the cross-entropy of what a row's last step reads, and 0 before."""

        def read_out(logits, tokens, positions):
            logits = forbid(logits, model.vocabulary)
            wish, _ = cross_entropy(logits, tokens)
            if self.language is not None:
                sampling = Sampling(self.temperature)
                return Choices.of(self.language, logits, model.vocabulary, sampling, keys, positions), wish
            proposed = sample(logits, stream(keys, "tokens"), positions, Sampling(self.temperature))
            return (proposed, -cross_entropy(logits, proposed)[1]), wish

        proposed, wish = model.map_logits(read_out, hidden, canvas.tokens, positions)
        if self.language is not None:
            draw, kept = (keys, positions) if self.temperature else None, jnp.zeros_like(eligible)
            proposed = choose_text(self.language, proposed, canvas.tokens, kept, canvas.target_mask, canvas.span, draw)
        tokens, log_probability = proposed
        chosen = self._choose(canvas, eligible, positions, keys)
        is_last = canvas.step[:, 0] == self.num_steps - 1
        if self.stop_when_unchanged:
            is_last |= jnp.all((tokens == canvas.tokens) | ~eligible, axis=-1)
        return Written(
            tokens=jnp.where(chosen, tokens, canvas.tokens),
            mask=chosen,
            log_probability=log_probability,
            score=jnp.where(is_last, -jnp.sum(jnp.where(eligible, wish, 0), axis=-1), 0),
            finished=is_last,
        )

    def _choose(self, canvas: Canvas, eligible: BoolBL, positions: IntBL, keys: KeyB) -> BoolBL:
        """Returns the positions that this step writes."""
        if self.update_share == 1:
            return eligible
        count = jnp.maximum(jnp.round(self.update_share * jnp.sum(eligible, axis=-1)), 1)
        if self.method == "sample":
            return choose(uniform(stream(keys, "order"), positions), eligible, count)
        return jnp.where(canvas.step % 2 == 0, eligible, choose(-canvas.log_probability, eligible, count))

    def finish(self, vocabulary: TokenIds, carry: Carry) -> Decoded:
        decoded = super().finish(vocabulary, carry)
        return decoded.replace(scores=-decoded.scores)
