"""Masked decoding: from a canvas of MASK, keeps the most confident tokens of each step until none is masked."""

import dataclasses
from typing import Literal, Self

import jax.numpy as jnp

from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.decoding.absorbing import AbsorbingRule
from diffusion_t5x.decoding.allowed_texts import Choices, choose_text
from diffusion_t5x.decoding.canvas import Canvas, Written
from diffusion_t5x.decoding.commit import Order, Softmax, choose, propose
from diffusion_t5x.decoding.counts import Counts, step_count
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.errors import UserError, check_choices
from diffusion_t5x.models.sampling import Sampling
from diffusion_t5x.models.transformer import Transformer
from diffusion_t5x.shapes import BoolBL, FloatBLD, IntB, IntB1, IntBL, KeyB


@dataclasses.dataclass(frozen=True)
class MaskedDecoder(AbsorbingRule):
    """Unmasks in `num_steps` steps (LLaDA, arXiv 2502.09992, section 2.4), or above a confidence.

    The latter is the confidence-aware parallel decoding of Fast-dLLM (arXiv 2505.22618). A written token stays. The
    score is the log-probability that each token had when it was written, averaged over targets: conditionals from
    different steps, not a likelihood. Higher is better.

    Attributes:
      num_steps: a row's targets, or with `window` those of each window, are divided over this many steps; rows with
        fewer targets write one per step. None: one per step.
      counts: how they are divided: "even": as evenly as possible, more in the first steps. Others are those of
        published code, see `counts.counts_table`.
      threshold: a step also writes every token whose probability (by `order`, or margin) exceeds it, and the rest is
        divided over the remaining steps; decoding stops when all rows are done. Fast-dLLM's is 0.9, with num_steps
        None.
      threshold_included: also every token whose probability is just that (Fast-dLLM, LMDeploy; not SDAR, SGLang,
        JetEngine).
      window: number of targets that are written before the next ones are, counted from the first target; each sees
        all others (LLaDA). None: all at once.
      order: which positions come first: see `commit.propose`. A threshold is one of confidence or of margin.
      softmax: of what certainty is the probability: see `commit.propose`.
      ends: when EOS, pad and `end_ids` are written. "free": like any token. "last": the most likely token is chosen
        among all, but the certainty is of the others, and positions where an end is the most likely come last. "never":
        not at all (LLaDA's `confidence_eos_eot_inf` and `logits_eos_inf`).
      end_ids: other tokens that end a text, such as the end of a turn.
      guidance: see `StepRule`.
      temperature: of sampling; 0 takes the most likely token. Above 0, texts are distributed as the model has them only
        one token per step and in another order than "confidence": that is the probability of the token drawn, so likely
        tokens win twice. Tokens written in the same step are independent of each other.
      top_k, top_p: see `Sampling`.
      language: what it may write, by `within`. Each step finds the best text of the language that has the tokens
        written so far, or at a temperature above 0 draws one (see `allowed_texts`), and writes that text's tokens at
        the positions that `order` picks.
    """

    num_steps: int | None = 10
    counts: Counts = "even"
    threshold: float | None = None
    threshold_included: bool = False
    window: int | None = None
    order: Order = "confidence"
    softmax: Softmax = "allowed"
    ends: Literal["free", "last", "never"] = "free"
    end_ids: tuple[int, ...] = ()
    guidance: float = 0.0
    language: Language | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self)
        if self.num_steps is not None and self.num_steps < 1:
            raise UserError(f"MaskedDecoder.num_steps must be at least 1, or None; got {self.num_steps}.")
        if self.window is not None and self.window < 1:
            raise UserError(f"MaskedDecoder.window must be at least 1, or None; got {self.window}.")
        if self.num_steps is None and self.counts != "even":
            raise UserError(f"MaskedDecoder.counts = {self.counts!r} needs num_steps; got None.")
        if self.threshold is not None and (not 0 <= self.threshold <= 1 or self.order not in ("confidence", "margin")):
            raise UserError(
                "MaskedDecoder.threshold must lie in [0, 1] and belongs to the order of confidence or margin; "
                f"got {self}."
            )

    @property
    def samples_model(self) -> bool:
        """False for the order of confidence: that is the probability of the token drawn."""
        free = self.ends == "free" and not self.language and not self.guidance
        return self.sampling == Sampling(1.0) and self.order != "confidence" and free

    def within(self, language: Language) -> Self:
        if self.ends != "free" or self.softmax != "allowed" or self.top_k is not None or self.top_p is not None:
            raise UserError(
                "With --regex or --json_schema, MaskedDecoder needs ends = 'free', softmax = 'allowed', top_k = None "
                f"and top_p = None: the others may leave no text of the language to write; got {self}."
            )
        return dataclasses.replace(self, language=language)

    def eligible(self, tokens: IntBL, target_mask: BoolBL, vocabulary: TokenIds, step: IntB1) -> BoolBL:
        """The targets that are still masked; with windows, in the first window that has any."""
        masked = super().eligible(tokens, target_mask, vocabulary, step)
        return masked & self._in_window(masked, target_mask)

    def _in_window(self, masked: BoolBL, target_mask: BoolBL) -> BoolBL:
        """The targets in each row's first window that has masked ones."""
        if self.window is None:
            return target_mask
        number = (jnp.cumsum(target_mask, axis=-1) - 1) // self.window
        first = jnp.min(jnp.where(masked, number, target_mask.shape[1]), axis=-1, keepdims=True)
        return target_mask & (number == first)

    def most_steps(self, num_targets: int) -> int:
        width = min(self.window or num_targets, num_targets)
        return -(-num_targets // width) * min(self.num_steps or width, width)

    def write(
        self,
        model: Transformer,
        hidden: FloatBLD,
        canvas: Canvas,
        eligible: BoolBL,
        positions: IntBL,
        keys: KeyB,
    ) -> Written:
        """Takes one step: writes some of the eligible positions, permanently."""

        ids = jnp.arange(model.config.num_embeddings)
        is_end = model.vocabulary.is_end(ids) | jnp.isin(ids, jnp.asarray(self.end_ids, jnp.int32))

        def read_out(logits, positions):
            logits = jnp.where(is_end, -jnp.inf, logits) if self.ends == "never" else logits
            last = is_end if self.ends == "last" else None
            own = propose(logits, keys, positions, model.vocabulary, self.sampling, self.order, self.softmax, last)
            if self.language is None:
                return own, None
            return own, Choices.of(self.language, logits, model.vocabulary, self.sampling, keys, positions)

        (tokens, log_probability, certainty), choices = model.map_logits(read_out, hidden, positions)
        if self.language is not None:
            draw = (keys, positions) if self.temperature else None
            kept = canvas.target_mask & (canvas.tokens != model.vocabulary.mask_id)
            tokens, log_probability = choose_text(
                self.language, choices, canvas.tokens, kept, canvas.target_mask, canvas.span, draw
            )
            certainty = jnp.exp(log_probability) if self.order == "confidence" else certainty
        chosen = choose(certainty, eligible, self._count(canvas, eligible), self.threshold, self.threshold_included)
        return self.written(canvas, chosen, tokens, log_probability)

    def _count(self, canvas: Canvas, eligible: BoolBL) -> IntB:
        """Returns the minimum number of eligible positions that this step writes."""
        in_window, taken = self._in_window(eligible, canvas.target_mask), canvas.step[:, 0]
        if self.window is not None:
            first = jnp.where(in_window & (canvas.written_at >= 0), canvas.written_at, canvas.step)
            taken -= jnp.min(first, axis=-1)
        total, left = (jnp.sum(x, axis=-1, dtype=jnp.int32) for x in (in_window, eligible))
        most = min(self.window or eligible.shape[1], eligible.shape[1])
        return step_count(self.counts, self.num_steps, most, total, left, taken)
